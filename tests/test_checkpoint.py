"""What a checkpoint of ours says about itself, to all who read it, and which checkpoints and files are taken."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from data import HERE, InputError
from data.checkpoint import load_config, weight_files, write_config
from data.prune import prune
from model import Transformer
from tests.test_model import FAMILIES, live

TOKENS = torch.arange(90)[None]


def change(folder, **fields) -> dict:
    """Change some fields of config.json; None removes one."""
    file = folder / "config.json"
    config = {k: v for k, v in (json.loads(file.read_text()) | fields).items() if v is not None}
    file.write_text(json.dumps(config))
    return config


@pytest.mark.parametrize("family", FAMILIES)
def test_older_readers_find_the_same_model(family, tmp_path):
    """They know rope_theta, rope_scaling and torch_dtype, not rope_parameters and dtype."""
    model = live(FAMILIES[family], seed=3)
    model.save_pretrained(tmp_path)
    before, written = AutoConfig.from_pretrained(tmp_path), (tmp_path / "config.json").read_bytes()
    write_config(load_config(tmp_path), tmp_path, torch.float32)
    assert (tmp_path / "config.json").read_bytes() == written
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    fields = change(tmp_path, rope_parameters=None, dtype=None)
    assert fields["architectures"] == [f"{fields['model_type'].capitalize()}ForCausalLM"]
    after = AutoConfig.from_pretrained(tmp_path)
    assert after.rope_parameters == before.rope_parameters == model.config.rope_parameters
    assert after.dtype == before.dtype == torch.float32
    with torch.no_grad():
        expected = model(TOKENS) @ model.head.T
        for reader in (loaded, AutoModelForCausalLM.from_pretrained(tmp_path)):
            assert (reader(TOKENS).logits - expected).norm() / expected.norm() < 1e-5


@pytest.mark.parametrize("declared", [{}, {"eos_token_id": 7}, {"eos_token_id": [7, 9], "pad_token_id": 0},
                                      {"bos_token_id": 5}])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_only_what_the_files_declare_is_passed_on(family, declared, tmp_path):
    """No default of transformers becomes a stop token."""
    live(FAMILIES[family], seed=3).save_pretrained(tmp_path)
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    change(tmp_path, **dict.fromkeys(names) | declared)
    Transformer.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
    written = json.loads((tmp_path / "again/config.json").read_text())
    assert {name: written[name] for name in names} == dict.fromkeys(names) | declared
    again = AutoConfig.from_pretrained(tmp_path / "again")
    assert [getattr(again, name) for name in names] == [declared.get(name) for name in names]


@pytest.mark.parametrize("scaling", [
    {"rope_type": "yarn", "factor": 4.0}, {"type": "yarn", "factor": 8.0, "beta_fast": 16},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
])
@pytest.mark.parametrize("family", ["llama-llama3", "qwen3-yarn"])
def test_the_length_to_scale_from_may_stand_at_the_top_of_the_file(family, scaling, tmp_path):
    reference = live(FAMILIES[family], seed=3)
    reference.save_pretrained(tmp_path)
    change(tmp_path, rope_parameters=None, rope_theta=1e4, rope_scaling=scaling, original_max_position_embeddings=32)
    for folder in (tmp_path, tmp_path / "again"):
        model, theirs = Transformer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            logits, expected = model(TOKENS) @ model.head.T, theirs(TOKENS).logits
        assert (logits - expected).norm() / expected.norm() < 1e-5
        if folder == tmp_path:
            model.save_pretrained(tmp_path / "again")


@pytest.mark.parametrize("quantization, message", [
    ({"quant_method": "fp8", "weight_block_size": [128, 128]}, r"quantized weights \(fp8\) are not supported"),
    ({"quant_method": "gptq", "bits": 4}, r"\(gptq\)"), ({"quant_method": "compressed-tensors"}, "compressed"),
    ({"load_in_4bit": True}, "quantized weights"),
])
def test_quantized_weights_are_refused_by_name(quantization, message, tmp_path):
    live(FAMILIES["qwen3"], seed=3).save_pretrained(tmp_path)
    change(tmp_path, quantization_config=quantization)
    with pytest.raises(InputError, match=f"config.json: quantization_config: .*{message}"):
        load_config(tmp_path)


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(HERE / "chains/teacher", tmp_path / "it")


def index(folder, names: dict[str, str]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


def test_one_file_goes_before_an_index_as_in_transformers(folder):
    weights = load_file(folder / "model.safetensors")
    other = {name: weight + 1 for name, weight in weights.items()}
    where = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(other)}
    for file in {*where.values()}:
        save_file({n: other[n] for n in other if where[n] == file}, folder / file, metadata={"format": "pt"})
    save_file({"x": torch.zeros(2)}, folder / "optimizer.safetensors")
    index(folder, where)
    for names, expected in ((["model.safetensors"], weights), (sorted({*where.values()}), other)):
        assert [file.name for file in weight_files(folder)] == names
        ours, theirs = Transformer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
        name = "model.norm.weight"
        assert torch.equal(ours.model.norm.weight, expected[name].float())
        assert torch.equal(theirs.model.norm.weight.float(), expected[name].float())
        (folder / "model.safetensors").unlink(missing_ok=True)


def test_a_student_is_made_of_the_weights_alone(folder, tmp_path):
    """Not of the optimizer's moments that lie beside those of our own checkpoints, nor of other copies."""
    weights = load_file(folder / "model.safetensors")
    save_file({f"{name}.exp_avg": w for name, w in weights.items()}, folder / "optimizer.safetensors")
    save_file({name: w + 1 for name, w in weights.items()}, folder / "z.safetensors")
    prune(str(folder), str(tmp_path / "pruned"), {1})
    found = load_file(tmp_path / "pruned/model.safetensors")
    assert not [name for name in found if "exp_avg" in name]
    assert torch.equal(found["model.layers.1.mlp.up_proj.weight"],
                       weights["model.layers.2.mlp.up_proj.weight"].bfloat16())
    assert AutoConfig.from_pretrained(tmp_path / "pruned").dtype == torch.bfloat16


@pytest.mark.parametrize("names, message", [
    ({"a": "model-1.safetensors"}, "no model-1.safetensors there"), ({}, "index.json: damaged"),
    ({"a": "../it/config.json"}, "index.json: damaged"), ({"a": "/etc/passwd"}, "index.json: damaged"),
    ({"a": 5}, "index.json: damaged"), ([1], "index.json: damaged"), (None, "no model.safetensors there"),
])
def test_missing_weights_and_damaged_indexes_are_one_line(folder, names, message):
    (folder / "model.safetensors").unlink()
    if names is not None:
        index(folder, names)
    with pytest.raises(InputError, match=message):
        weight_files(folder)
