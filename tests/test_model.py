import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from data import HERE, InputError
from data.checkpoint import check_config, head_dim_of
from data.prune import prune
from model import Transformer, count_flops
from tests.reference import live

SMALL = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "max_position_embeddings": 256,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
    "initializer_range": 0.2,
}
SCALED = {k: v for k, v in SMALL.items() if k != "rope_parameters"} | {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
FAMILIES = {
    "qwen3": Qwen3Config(**SMALL, num_attention_heads=4, num_key_value_heads=2, head_dim=16, tie_word_embeddings=False),
    "qwen3-tied": Qwen3Config(
        **SMALL, num_attention_heads=6, num_key_value_heads=1, head_dim=8, tie_word_embeddings=True
    ),
    "qwen2": Qwen2Config(**SMALL, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True),
    "llama": LlamaConfig(**SMALL, num_attention_heads=6, num_key_value_heads=3, tie_word_embeddings=False),
    "llama-biases": LlamaConfig(
        **SMALL,
        num_attention_heads=4,
        num_key_value_heads=4,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=True,
    ),
    # scaled rotary embeddings, with an original context of 32 that the tests' sequences exceed
    "llama-llama3": LlamaConfig(**SCALED, rope_parameters=LLAMA3),
    "llama-linear": LlamaConfig(**SCALED, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5}),
    "qwen3-yarn": Qwen3Config(**SCALED, head_dim=32, rope_parameters=YARN),
    "qwen2-yarn-options": Qwen2Config(
        **SCALED, rope_parameters=YARN | {"beta_fast": 8.0, "beta_slow": 2.0, "mscale": 0.7, "mscale_all_dim": 1.2}
    ),
    "qwen2-yarn-factor": Qwen2Config(**SCALED, rope_parameters=YARN | {"attention_factor": 1.3, "truncate": False}),
}


def reference_model(family: str, seed: int = 0):
    """The transformers model with random weights everywhere, norms and biases included."""
    torch.manual_seed(seed)
    reference = AutoModelForCausalLM.from_config(FAMILIES[family], attn_implementation="eager").float().eval()
    with torch.no_grad():
        for p in reference.parameters():
            if p.dim() == 1:
                p.add_(0.3 * torch.randn_like(p))
    return reference


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_equal_transformers(family, tmp_path):
    reference = reference_model(family)
    reference.save_pretrained(tmp_path)
    model = Transformer.from_pretrained(tmp_path)
    tokens = torch.randint(0, 97, (3, 90), generator=torch.Generator().manual_seed(1))
    logits, expected = model(tokens) @ model.head.T, reference(tokens).logits
    assert (logits - expected).norm() / expected.norm() < 1e-5
    probe = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    (logits * probe).sum().backward()
    (expected * probe).sum().backward()
    theirs = dict(reference.named_parameters())
    for name, p in model.named_parameters():
        # relative to the norm, but for gradients that are zero in exact arithmetic (a key bias shifts all scores alike)
        assert (p.grad - theirs[name].grad).norm() <= 1e-5 * theirs[name].grad.norm() + 1e-4, name


def test_pruned_layers_are_the_ones_named(tmp_path):
    folder = tmp_path / "whole"
    shutil.copytree(HERE / "chains/teacher", folder)
    assert prune(str(folder), str(tmp_path / "pruned"), {1, 2}) == 2
    pruned = Transformer.from_pretrained(tmp_path / "pruned")
    whole, loaded = Transformer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    assert loaded.config.num_hidden_layers == len(loaded.config.layer_types) == 2
    tokens = torch.arange(40).view(2, 20)
    whole.model.layers = torch.nn.ModuleList([whole.model.layers[0], whole.model.layers[3]])
    expected = whole.bfloat16().float()(tokens) @ whole.head.T
    assert ((pruned(tokens) @ pruned.head.T - expected).norm() / expected.norm()) < 1e-5
    assert ((loaded(tokens).logits.float() - expected).norm() / expected.norm()) < 0.05  # computes in bfloat16
    with pytest.raises(InputError, match="expected some of the layers 0 to 3"):
        prune(str(folder), str(tmp_path / "none"), {4})
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(InputError, match="model.safetensors: damaged"):
        prune(str(folder), str(tmp_path / "none"), {1})


def test_unusable_weights_are_refused_by_name(tmp_path):
    live(FAMILIES["qwen3"], seed=8).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    for name, tensor, message in (
        ("model.layers.1.mlp.up_proj.weight", None, r"Missing key.*model.layers.1.mlp.up_proj.weight"),
        ("model.layers.0.surprise", torch.zeros(2), r"Unexpected key.*model.layers.0.surprise"),
        ("model.norm.weight", torch.zeros(2), "size mismatch for model.norm.weight"),
        ("model.norm.weight", torch.full((48,), torch.nan), "model.norm.weight is not finite"),
    ):
        save_file({k: w for k, w in (weights | {name: tensor}).items() if w is not None}, file)
        with pytest.raises(InputError, match=message):
            Transformer.from_pretrained(tmp_path)


@pytest.mark.parametrize("change, message", [
    ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported"),
    ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_type 'dynamic'"),
    ({"rope_parameters": LLAMA3 | {"low_freq_factor": None}}, "validate_rope|needs a number|damaged"),
    ({"is_causal": False}, "is_causal false"), ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary"),
    ({"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}, "sliding-window"),
])
def test_unusable_configurations_are_refused_by_name(tmp_path, change, message):
    (tmp_path / "config.json").write_text(json.dumps(FAMILIES["qwen3"].to_dict() | change))
    with pytest.raises(InputError, match=message):
        Transformer.from_pretrained(tmp_path)


def test_a_rope_without_its_numbers_is_refused():
    for key in ("rope_theta", "low_freq_factor"):
        with pytest.raises(InputError, match=f"rope_type 'llama3' needs a number '{key}'"):
            check_config(SimpleNamespace(model_type="qwen3", rope_parameters=LLAMA3 | {key: None}))


def test_places_without_a_checkpoint_are_told(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for path, message in (("nobody-here/no-such-model", "the hub did not give it .* give the folder of a local copy"),
                          (str(tmp_path), "no config.json there"), (str(tmp_path / "nowhere"), "no such folder")):
        with pytest.raises(InputError, match=message):
            Transformer.from_pretrained(path)


@pytest.mark.parametrize("family", FAMILIES)
def test_flop_count_equals_torch(family):
    """torch counts causal attention as the full square, so the count is compared under that convention."""
    from torch.utils.flop_counter import FlopCounterMode

    model = live(FAMILIES[family], seed=9)
    tokens = torch.randint(0, 97, (2, 30))
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(tokens)[:, -3:].reshape(6, 48) @ model.head.T
    pairs = 4 * 3 * (model.config.num_attention_heads * head_dim_of(model.config)) * (30 * 30 - 30 * 31 / 2) * 2
    assert counter.get_total_flops() == count_flops(model.config, torch.tensor([30, 30]), 6) + pairs
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        (model(tokens)[:, -3:].reshape(6, 48) @ model.head.T).sum().backward()
    assert counter.get_total_flops() == pytest.approx(
        3 * (count_flops(model.config, torch.tensor([30, 30]), 6) + pairs), rel=0.01)


@pytest.mark.parametrize("family", ["qwen3", "llama-biases"])
def test_recomputed_blocks_give_the_same_gradient_from_less_memory(family):
    grads, saved = [], []
    tokens = torch.randint(0, 97, (2, 20), generator=torch.Generator().manual_seed(0))
    for recompute in (False, True):
        model, sizes = live(FAMILIES[family], seed=9), []
        model.recompute = recompute
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):  # noqa: B023
            hidden = model(tokens)
        hidden.square().sum().backward()
        saved.append(sum(sizes))
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*grads)) and saved[1] < saved[0] / 3


def test_a_tied_configuration_with_a_head_of_its_own_is_read_as_transformers_reads_it(tmp_path):
    for family, equal in (("qwen3-tied", False), ("qwen2", False), ("llama-biases", True)):
        folder = tmp_path / family
        live(FAMILIES[family], seed=4).save_pretrained(folder)
        weights = load_file(folder / "model.safetensors")
        embedding = weights["model.embed_tokens.weight"]
        weights["lm_head.weight"] = embedding.clone() if equal else embedding.flip(0).contiguous()
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        model, reference = Transformer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
        tokens = torch.arange(40).view(2, 20)
        assert torch.allclose(model(tokens) @ model.head.T, reference(tokens).logits, rtol=1e-4, atol=1e-4), family
        assert model.config.tie_word_embeddings == equal
        model.save_pretrained(folder / "again")
        again = Transformer.from_pretrained(folder / "again")
        assert torch.equal(again(tokens) @ again.head.T, model(tokens) @ model.head.T)
