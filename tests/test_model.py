import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

import model as model_file
from data import HERE, InputError
from data.books import activation_bytes, count_flops
from data.prune import prune
from model import ONEDNN, Decoder, KVCache, Transformer, product
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
    hidden = reference.model(tokens).last_hidden_state
    assert (model(tokens) - hidden).norm() / hidden.norm() < 1e-5
    probe = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    (logits * probe).sum().backward()
    (expected * probe).sum().backward()
    theirs = dict(reference.named_parameters())
    for name, p in model.named_parameters():
        # relative to the norm, but for gradients that are zero in exact arithmetic (a key bias shifts all scores alike)
        assert (p.grad - theirs[name].grad).norm() <= 1e-5 * theirs[name].grad.norm() + 1e-4, name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_reloads_in_transformers(family, tmp_path):
    model = live(FAMILIES[family], seed=3)
    model.save_pretrained(tmp_path)
    reference, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    tokens = torch.arange(60).view(2, 30)
    expected = reference(tokens).logits
    assert ((model(tokens) @ model.head.T) - expected).norm() / expected.norm() < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_decoding_equals_the_full_forward(family):
    """Prefill ragged prompts, decode some tokens each, and compare every hidden state with the forward of the whole
    row."""
    model = live(FAMILIES[family], seed=4).double()
    lens, new = torch.tensor([1, 7, 4]), 6
    tokens = torch.randint(0, 97, (3, 13), generator=torch.Generator().manual_seed(5))
    full = model(tokens)  # row i holds lens[i] + new tokens of interest, the rest is never looked at
    cache = KVCache(model.config, 3, 13, "cpu", torch.float64)
    with torch.no_grad():
        prefill = model(tokens[:, :7], cache=cache)
        for i, n in enumerate(lens):
            assert torch.allclose(prefill[i, :n], full[i, :n], atol=1e-10)
        for step in range(new):
            at = (lens + step)[:, None]
            hidden = model(tokens.gather(1, at), positions=at, cache=cache, slots=7 + step + 1)
            assert torch.allclose(hidden, full[torch.arange(3)[:, None], at], atol=1e-10)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_token_hears_all_before_it_and_none_after(family):
    """Also shows that the random models of these tests attend at all."""
    model = live(FAMILIES[family], seed=5).double()
    tokens = torch.arange(40)[None]
    hidden = model(tokens)
    for at in (0, 17, 38):
        other = tokens.clone()
        other[0, at] = 96
        change = (model(other) - hidden).norm(dim=-1)[0]
        assert not change[:at].any() and change[at:].min() > 1e-6


def test_padding_on_the_right_is_not_seen():
    model = live(FAMILIES["qwen3"], seed=6).double()
    tokens = torch.randint(0, 97, (1, 9))
    padded = torch.cat([tokens, torch.randint(0, 97, (1, 5))], dim=1)
    assert torch.allclose(model(tokens), model(padded)[:, :9], atol=1e-12)


def test_sharded_checkpoints_load(tmp_path):
    model = live(FAMILIES["llama"], seed=7)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    names, index = sorted(weights), {}
    for shard, part in enumerate((names[:10], names[10:])):
        file = f"model-{shard + 1:05d}-of-00002.safetensors"
        save_file({n: weights[n] for n in part}, tmp_path / file)
        index |= dict.fromkeys(part, file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    loaded = Transformer.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters()))


def test_pruned_layers_are_the_ones_named(tmp_path):
    folder = tmp_path / "whole"
    shutil.copytree(HERE / "chains/teacher", folder)
    pruned = prune(str(folder), str(tmp_path / "pruned"), {1, 2})
    whole, loaded = Transformer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    assert loaded.config.num_hidden_layers == len(loaded.config.layer_types) == 2
    tokens = torch.arange(40).view(2, 20)
    whole.model.layers = torch.nn.ModuleList([whole.model.layers[0], whole.model.layers[3]])
    expected = whole(tokens) @ whole.head.T
    assert torch.equal(pruned(tokens) @ pruned.head.T, expected)
    assert ((loaded(tokens).logits.float() - expected).norm() / expected.norm()) < 0.05  # bfloat16 on disk
    cache = KVCache(pruned.config, 2, 20, "cpu", torch.float32)  # each layer writes to its new place
    pruned(tokens, cache=cache)
    assert cache.kv.shape[0] == 2 and cache.kv.flatten(1).abs().sum(1).all()
    with pytest.raises(InputError, match="expected some of the layers 0 to 3"):
        prune(str(folder), str(tmp_path / "none"), {4})


def test_unusable_checkpoints_are_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    live(FAMILIES["qwen3"], seed=8).save_pretrained(tmp_path / "good")

    def broken(name):
        shutil.copytree(tmp_path / "good", tmp_path / name)
        return tmp_path / name, load_file(tmp_path / "good/model.safetensors")

    folder, weights = broken("missing")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(InputError, match="model.layers.1.mlp.up_proj.weight is missing"):
        Transformer.from_pretrained(folder)
    folder, weights = broken("extra")
    save_file(weights | {"model.layers.0.surprise": torch.zeros(2)}, folder / "model.safetensors")
    with pytest.raises(InputError, match="model.layers.0.surprise has no place"):
        Transformer.from_pretrained(folder)
    folder, weights = broken("shape")
    save_file(weights | {"model.norm.weight": torch.zeros(2)}, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"model.norm.weight has shape \(2,\)"):
        Transformer.from_pretrained(folder)
    folder, _ = broken("torn")
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match="not a complete safetensors file"):
        Transformer.from_pretrained(folder)
    folder, _ = broken("pickle")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="no model.safetensors there"):
        Transformer.from_pretrained(folder)
    for name, change, message in (
        ("family", {"model_type": "gpt2"}, "model_type 'gpt2' is not supported"),
        (
            "rope",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type 'dynamic'",
        ),
        ("factor", {"rope_parameters": LLAMA3 | {"low_freq_factor": None}}, "validate_rope|needs a number"),
        ("window", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}, "sliding-window"),
    ):
        folder, _ = broken(name)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(InputError, match=message):
            Transformer.from_pretrained(folder)
    with pytest.raises(InputError, match="the hub did not give it .* give the folder of a local copy"):
        Transformer.from_pretrained("nobody-here/no-such-model")
    with pytest.raises(InputError, match="no config.json there"):
        Transformer.from_pretrained(str(tmp_path))
    with pytest.raises(InputError, match="no such folder"):
        Transformer.from_pretrained(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("family", FAMILIES)
def test_flop_count_equals_torch(family):
    """torch counts causal attention as the full square, so the count is compared under that convention."""
    from torch.utils.flop_counter import FlopCounterMode

    model = live(FAMILIES[family], seed=9)
    tokens = torch.randint(0, 97, (2, 30))
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(tokens)[:, -3:].reshape(6, 48) @ model.head.T
    assert counter.get_total_flops() == count_flops(model.config, 60, 2 * 30 * 30, 6)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        (model(tokens)[:, -3:].reshape(6, 48) @ model.head.T).sum().backward()
    assert counter.get_total_flops() == pytest.approx(3 * count_flops(model.config, 60, 2 * 30 * 30, 6), rel=0.01)


@pytest.mark.parametrize("amd", [True, False])
@pytest.mark.parametrize("dtype, atol", [(torch.float64, 1e-14), (torch.float32, 1e-5)])
@pytest.mark.parametrize("rows, outputs", [(1, 11), (1, 48), (2, 11), (3, 11), (4, 11), (5, 48), (128, 11)])
def test_product_is_the_product_whichever_way_it_is_taken(rows, outputs, dtype, atol, amd, monkeypatch):
    monkeypatch.setattr(model_file, "AMD", amd)
    g = torch.Generator().manual_seed(rows)
    weight, x, bias = (torch.randn(*n, 7, generator=g, dtype=dtype) for n in ((outputs,), (rows,), (outputs,)))
    sliced, bias = weight.repeat(1, 2)[2:9, 4:11], bias[:, 0].contiguous()  # the first is not contiguous
    for given in (x, x.repeat(1, 2)[:, 3:10]):  # nor is the second
        found = product(given, weight, bias)
        assert found.is_contiguous() and torch.allclose(found, given @ weight.T + bias, rtol=0, atol=atol)
        if dtype == torch.float32 and ONEDNN:
            packed = torch.ops.mkldnn._reorder_linear_weight(weight)
            assert packed.is_mkldnn and torch.allclose(product(given, packed, bias), found, rtol=0, atol=atol)
    assert torch.allclose(product(x, sliced), x @ sliced.T, rtol=0, atol=atol)


@pytest.mark.parametrize("dtype, atol", [(torch.float64, 1e-12), (torch.float32, 2e-4)])
@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_decoder_computes_what_the_model_does(family, rows, dtype, atol):
    """Prefill of ragged prompts and six steps of decoding, in every layout: one row, few, and packed in float32."""
    model = live(FAMILIES[family], seed=3).to(dtype).requires_grad_(False)
    decoder, vocab = Decoder(model, rows, 90), model.head.shape[0]
    assert decoder.packed == (rows >= 4 and dtype == torch.float32 and ONEDNN)
    g = torch.Generator().manual_seed(rows)
    tokens, lens = torch.randint(vocab, (rows, 9), generator=g), torch.randint(1, 10, (rows,), generator=g)
    caches = [KVCache(model.config, rows, 20, "cpu", dtype) for _ in range(2)]
    expected, found = model(tokens, cache=caches[0]), decoder(tokens, cache=caches[1])
    assert torch.allclose(found, expected, rtol=0, atol=atol) and found.dtype == dtype
    for step in range(6):
        new, at = torch.randint(vocab, (rows, 1), generator=g), (lens + step)[:, None]
        slots = None if step % 2 else int(at.max()) + 1
        expected, found = (m(new, at, c, slots=slots) for m, c in zip((model, decoder), caches))
        assert torch.allclose(found, expected, rtol=0, atol=atol)
        logits = decoder.logits(found[:, 0])
        assert torch.allclose(logits, expected[:, 0] @ model.head[:90].T, rtol=0, atol=10 * atol)


@pytest.mark.parametrize("family", FAMILIES)
def test_activations_kept_for_backward_are_predicted(family):
    """Every tensor that autograd saves in a forward pass, parameters aside, against the count from the config."""
    model, kept, batch, length = live(FAMILIES[family], seed=9), {}, 3, 64
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    alive = []  # or memory would be used again, and counted once

    def pack(x):
        alive.append(x)
        if x.untyped_storage().data_ptr() not in parameters:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        model(torch.randint(0, 97, (batch, length)))
    assert activation_bytes(model.config, batch * length, half=False) == pytest.approx(sum(kept.values()), rel=0.06)


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


def test_embedded_pair_loads_in_transformers():
    for name in ("teacher", "student"):
        folder = HERE / "chains" / name
        model, reference = Transformer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
        tokens = torch.randint(0, 424, (2, 50), generator=torch.Generator().manual_seed(0))
        expected = reference.float()(tokens).logits
        assert ((model(tokens) @ model.head.T) - expected).norm() / expected.norm() < 1e-5
