"""A decoder-only transformer that reads and writes Hugging Face checkpoints of the Qwen2/2.5, Qwen3 and Llama families.

The module tree spells the Hugging Face parameter names (`model.layers.0.self_attn.q_proj.weight`, ...), so a checkpoint
is loaded and saved without a table of names. The forward pass returns hidden states, not logits: the vocabulary head is
a (V, H) matrix that sampling applies to one position a row and the loss applies chunk by chunk, so that a (B, T, V)
tensor never exists.

    model = Transformer.from_pretrained("data/chains/teacher")
    hidden = model(tokens)                 # (B, T) -> (B, T, H)
    logits = hidden @ model.head.T         # (B, T, V), for those who can afford it

Read in this order: RMSNorm, rope, KVCache, Attention, MLP, Block, Transformer; then Decoder, which is the same again
in fewer and faster calls, for sampling on a CPU.
"""

import copy
import difflib
import math
import os
import platform
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from data import HERE, InputError, read_json

# On a CPU fresh memory costs more than the arithmetic on it; huge pages make it cheaper. And oneDNN is to keep 128
# kernels, not 1024: each is for one number of rows, and a thousand took half a gigabyte. torch reads these when it
# first needs them.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(name, "128")
CPUINFO = Path("/proc/cpuinfo")
AMD = CPUINFO.is_file() and "AuthenticAMD" in CPUINFO.read_text(errors="replace")  # told by Linux only
ONEDNN = torch.backends.mkldnn.is_available() and platform.machine() in ("x86_64", "AMD64")


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype.itemsize >= 4:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        # The mean of squares is taken in float32, as the checkpoints were trained; then back to x's dtype.
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


def rope_frequencies(config) -> tuple[Tensor, float]:
    """The rotary frequencies, float32 (D/2,), in radians a token, and a factor on cos and sin.

    Pair i of features turns by theta^(-2i/D) a token. The scaling kinds slow down the pairs that turn so slowly that
    they did not complete a turn in the context of pretraining, so that longer contexts show them no angle they have not
    seen: linear divides all frequencies alike; llama3 divides the slow ones, keeps the fast ones and interpolates
    between, by wavelength; yarn (arXiv 2309.00071) the same by feature index, and sharpens attention by the factor.
    """
    rope, D = config.rope_parameters, head_dim_of(config)
    theta, kind = rope["rope_theta"], rope.get("rope_type", "default")
    freq = theta ** (-torch.arange(0, D, 2, dtype=torch.float32, device="cpu") / D)
    if kind == "default":
        return freq, 1.0
    factor = rope["factor"]
    if kind == "linear":
        return freq / factor, 1.0
    original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
    if kind == "llama3":
        turns = original * freq / (2 * math.pi)  # completed within the original context
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        return freq * (kept + (1 - kept) / factor), 1.0
    # yarn: the feature pair that completes n turns in the original context has the index
    def pair(turns: float) -> float:
        return D * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair(rope.get("beta_fast") or 32), pair(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, D - 1)
    slowed = ((torch.arange(D // 2, device="cpu") - low) / max(high - low, 0.001)).clamp(0, 1)
    scale = rope.get("attention_factor")
    if scale is None:
        def log_scale(m: float) -> float:
            return 0.1 * m * math.log(factor) + 1.0 if factor > 1 else 1.0

        m, m_all = rope.get("mscale"), rope.get("mscale_all_dim")
        scale = log_scale(m) / log_scale(m_all) if m and m_all else log_scale(1.0)
    return freq * (1 - slowed + slowed / factor), float(scale)


def rope_tables(positions: Tensor, frequencies: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotary angles, float32 (..., T, 1, D): one frequency per pair of features (i, i + D/2). The
    first half of the sines is negative, as `rotate` wants them."""
    angles = positions[..., None].float() * frequencies  # (..., T, D/2)
    cos, sin = angles.cos() * scale, angles.sin() * scale
    return torch.cat((cos, cos), dim=-1).unsqueeze(-2), torch.cat((-sin, sin), dim=-1).unsqueeze(-2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (a, b) = (x_i, x_{i+D/2}) of x (B, T, heads, D) to (a cos - b sin, b cos + a sin)."""
    return torch.addcmul(x * cos.to(x.dtype), x.roll(x.shape[-1] // 2, -1), sin.to(x.dtype))


class KVCache:
    """Keys and values of every layer, preallocated: (layers, B, 2 num_kv_heads, S_max, D), the keys' heads first.

    S_max is the longest prompt plus the number of tokens to sample, not the model's context. Each row writes at its own
    positions, so prompts of different lengths need no padding between prompt and response.
    """

    def __init__(self, config, batch: int, max_len: int, device, dtype):
        self.heads = config.num_key_value_heads
        shape = (config.num_hidden_layers, batch, 2 * self.heads, max_len, head_dim_of(config))
        self.kv = torch.zeros(shape, device=device, dtype=dtype)

    def read(self, layer: int, length: int) -> tuple[Tensor, Tensor]:
        """Views of one layer's keys and values, (B, num_kv_heads, length, D) each."""
        return self.kv[layer, :, : self.heads, :length], self.kv[layer, :, self.heads :, :length]

    def fill(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Write k, v (B, T, num_kv_heads, D) of one layer at the first T positions."""
        self.kv[layer, :, : self.heads, : k.shape[1]] = k.transpose(1, 2)
        self.kv[layer, :, self.heads :, : k.shape[1]] = v.transpose(1, 2)

    def write(self, layer: int, positions: Tensor, kv: Tensor) -> None:
        """Write kv (B, T, 2 num_kv_heads, D), keys and values of one layer, at positions (B, T)."""
        rows = torch.arange(len(kv), device=kv.device)[:, None]
        self.kv[layer, rows, :, positions] = kv

    def first(self, rows: int) -> "KVCache":
        """The same memory, seen as a cache of its first `rows` batch rows."""
        view = copy.copy(self)
        view.kv = self.kv[:, :rows]
        return view

    def copy_rows(self, to: Tensor, source: "KVCache", rows: Tensor, length: int) -> None:
        """Batch rows `to` (n,) become rows (n,) of another cache (or of this one), up to a length."""
        for layer in range(len(self.kv)):  # layer by layer, so that no second copy of the cache is made on the way
            self.kv[layer, to, :, :length] = source.kv[layer, rows, :, :length]


class Attention(nn.Module):
    def __init__(self, config, layer: int):
        super().__init__()
        self.layer = layer
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads, config.num_key_value_heads, head_dim_of(config)
        )
        bias = config.model_type == "qwen2" or bool(getattr(config, "attention_bias", False))
        out_bias = config.model_type != "qwen2" and bias  # Qwen2 has biases on q, k and v but not on o
        self.q_proj = nn.Linear(config.hidden_size, self.heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, self.kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, self.kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(self.heads * self.head_dim, config.hidden_size, bias=out_bias)
        if config.model_type == "qwen3":  # QK-norm: each head's query and key are normalised before they are rotated
            self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None, positions: Tensor, mask) -> Tensor:
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, self.heads, self.head_dim)
        k = self.k_proj(x).view(B, T, self.kv_heads, self.head_dim)
        v = self.v_proj(x).view(B, T, self.kv_heads, self.head_dim)
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if mask is None:  # training and prefill: every token sees itself and what came before it in its row
            if cache is not None:
                cache.fill(self.layer, k, v)
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        else:  # decoding: the new tokens see the cache
            cache.write(self.layer, positions, torch.cat((k, v), dim=2))
            q = q.transpose(1, 2)
            k, v = cache.read(self.layer, mask.shape[-1])
            if T == 1:  # the query heads that share a key stand as one key head's queries, so that it is read once
                q = q.reshape(B, self.kv_heads, -1, self.head_dim)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=q.shape[1] != self.kv_heads
        )
        y = y.reshape(B, self.heads, T, self.head_dim).transpose(1, 2)
        return self.o_proj(y.reshape(B, T, self.heads * self.head_dim))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config):
        super().__init__()
        bias = bool(getattr(config, "mlp_bias", False))
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, *attention_args) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), *attention_args)
        return x + self.mlp(self.post_attention_layernorm(x))


class Transformer(nn.Module):
    """The model. `config` is a transformers configuration of one of the supported families."""

    def __init__(self, config):
        super().__init__()
        check_config(config)
        self.config = config
        self.frequencies, self.rope_scale = rope_frequencies(config)  # not a parameter, and not in the checkpoint
        self.recompute = False  # what is inside the blocks, in backward: less memory, a third more FLOP
        self.model = nn.Module()  # the Hugging Face trees put everything but the head under "model."
        self.model.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.model.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.model.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head(self) -> Tensor:
        """The (V, H) matrix that turns hidden states into logits; the embedding itself when the two are tied."""
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def forward(
        self, tokens: Tensor, positions: Tensor | None = None, cache: KVCache | None = None, slots: int | None = None
    ) -> Tensor:
        """Hidden states after the final norm: tokens (B, T) -> (B, T, H).

        Without `positions`, row tokens stand at 0..T-1 and attention is causal; pad on the right, where padding cannot
        be seen by what stands before it. With a cache, keys and values are also stored (prefill).
        With `positions` (B, T) and a cache, the tokens are written at their positions and each attends to the cache's
        slots 0..position of its own row (decoding). `slots`, if given, promises that no position is beyond it, so that
        the empty rest of the cache need not be read.
        """
        decoding = positions is not None and cache is not None
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)[None]  # (1, T)
        if self.frequencies.device != tokens.device:
            self.frequencies = self.frequencies.to(tokens.device)
        x = self.model.embed_tokens(tokens)
        cos, sin = rope_tables(positions, self.frequencies, self.rope_scale)
        mask = None
        if decoding:
            slot = torch.arange(slots or cache.kv.shape[3], device=tokens.device)
            mask = (slot <= positions[..., None])[:, None]  # (B, 1, T, S)
        for block in self.model.layers:
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, cos, sin, cache, positions, mask, use_reentrant=False)
            else:
                x = block(x, cos, sin, cache, positions, mask)
        return self.model.norm(x)

    def initialize(self, seed: int) -> "Transformer":
        """Fresh weights from a seed, for training from scratch.

        Matrices are normal with variance 1 / fan-in, except that what each block adds to the stream starts at zero, so
        that the tokens' identities are not drowned before there is anything to say about them. On the embedded task the
        loss falls in about half the steps of the families' own normal(0, 0.02). QK-norm gains start at 2, which lets
        scores spread further than at 1; a trial showed no clear gain from it (LOG.md).
        """
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, p in self.named_parameters():
                if name.endswith(("o_proj.weight", "down_proj.weight", "bias")):
                    p.zero_()
                elif p.dim() == 2:
                    p.normal_(0.0, p.shape[1] ** -0.5, generator=generator)
                else:
                    p.fill_(2.0 if name.endswith(("q_norm.weight", "k_norm.weight")) else 1.0)
        return self

    @classmethod
    def from_pretrained(cls, path: str, device="cpu", dtype: torch.dtype = torch.float32) -> "Transformer":
        """Load a checkpoint: a folder, or the name of a repository on the Hugging Face hub. Safetensors only.

        The model is built on the meta device and filled tensor by tensor from memory-mapped files, so peak memory is
        one copy of the weights. Raises InputError when the folder is no checkpoint, the architecture is not supported,
        or a tensor is missing, unknown or of the wrong shape.
        """
        folder = checkpoint_folder(path)
        with torch.device("meta"):
            model = cls(load_config(folder))
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            files = sorted({folder / name for name in read_json(index).get("weight_map", {}).values()})
        else:
            files = [folder / "model.safetensors"]
        expected = dict(model.named_parameters())
        weights = {}
        for file in files:
            if not file.is_file():
                raise InputError(f"{path}: no {file.name} there (weights are read from safetensors only)")
            try:
                with safe_open(file, framework="pt", device=str(device)) as tensors:
                    for name in tensors.keys():  # noqa: SIM118 (not a dict, and not iterable)
                        if name == "lm_head.weight" and model.config.tie_word_embeddings:
                            continue  # some tied checkpoints store the shared matrix twice
                        if name.endswith("rotary_emb.inv_freq"):
                            continue  # some old Llama checkpoints store what follows from the configuration
                        if name not in expected:
                            raise InputError(f"{file}: tensor {name} has no place in a {model.config.model_type} model")
                        tensor = tensors.get_tensor(name)
                        if tensor.shape != expected[name].shape:
                            raise InputError(
                                f"{file}: {name} has shape {tuple(tensor.shape)}, config.json asks for "
                                f"{tuple(expected[name].shape)}"
                            )
                        weights[name] = tensor.to(dtype)
            except SafetensorError as error:
                raise InputError(f"{file}: not a complete safetensors file ({error})") from None
        missing = sorted(set(expected) - set(weights))
        if missing:
            raise InputError(f"{path}: tensor {missing[0]} is missing (and {len(missing) - 1} more)")
        model.load_state_dict(weights, assign=True)
        return model

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write config.json and model.safetensors; transformers and vLLM load the folder as it is."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        dtype = dtype or self.head.dtype
        self.config.dtype = dtype
        self.config.save_pretrained(folder)
        weights = {name: p.detach().to("cpu", dtype).contiguous() for name, p in self.named_parameters()}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


class Decoder:
    """The weights of a model laid out anew for sampling on a CPU: what Transformer.forward computes, sooner.

    A decode step reads all weights for a few rows, so what counts is how fast they stream, and how many calls there are
    besides. q, k and v are one matrix here, as are gate and up; from four rows on all matrices are packed as oneDNN
    wants them. The features of a query's and a key's head stand in another order, each pair (i, i + D/2) that RoPE
    turns as one complex number, so that turning is a product; scores do not depend on the order. It is a second copy of
    the weights, made in the time of a few steps.
    """

    def __init__(self, model: Transformer, rows: int, vocab: int | None = None):
        """rows: how many will be decoded at once, at most. vocab: how many tokens of the head are needed."""
        c, self.model = model.config, model
        self.heads, self.kv_heads, self.head_dim = c.num_attention_heads, c.num_key_value_heads, head_dim_of(c)
        self.embed = model.model.embed_tokens.weight.detach()
        self.packed = ONEDNN and rows >= 4 and self.embed.dtype == torch.float32
        pairs = torch.arange(self.head_dim).view(2, -1).T.flatten()  # 0, D/2, 1, D/2 + 1, ...

        def paired(x: Tensor | None) -> Tensor | None:
            return x if x is None else x.unflatten(0, (-1, self.head_dim))[:, pairs].flatten(0, 1)

        def join(*parts: Tensor | None) -> Tensor | None:
            return parts[0] if parts[0] is None else (torch.cat(parts) if len(parts) > 1 else parts[0]).detach()

        def matrix(weights: list, biases: list) -> tuple[Tensor, Tensor | None]:
            return self.pack(join(*weights)), join(*biases)

        self.layers = []
        for block in model.model.layers:
            a, m, qk_gain = block.self_attn, block.mlp, None
            if hasattr(a, "q_norm"):  # of all heads of q and k: they are normalised together
                gains = [gain_of(a.q_norm)] * self.heads + [gain_of(a.k_norm)] * self.kv_heads
                qk_gain = torch.stack(gains)[:, pairs]
            q, k, v, o = a.q_proj, a.k_proj, a.v_proj, a.o_proj
            self.layers.append((
                gain_of(block.input_layernorm),
                matrix([paired(q.weight), paired(k.weight), v.weight], [paired(q.bias), paired(k.bias), v.bias]),
                qk_gain,
                matrix([o.weight], [o.bias]),
                gain_of(block.post_attention_layernorm),
                matrix([m.gate_proj.weight, m.up_proj.weight], [m.gate_proj.bias, m.up_proj.bias]),
                matrix([m.down_proj.weight], [m.down_proj.bias]),
            ))  # fmt: skip
        self.last_gain, self.head = gain_of(model.model.norm), self.pack(model.head[:vocab].detach())
        self.floors = [self.embed.new_tensor(n * c.rms_norm_eps).sqrt() for n in (c.hidden_size, self.head_dim)]

    def pack(self, weight: Tensor) -> Tensor:
        return torch.ops.mkldnn._reorder_linear_weight(weight) if self.packed else weight

    def logits(self, hidden: Tensor) -> Tensor:
        """(b, H) -> (b, vocab)."""
        return product(hidden, self.head)

    def __call__(
        self, tokens: Tensor, positions: Tensor | None = None, cache: KVCache | None = None, slots: int | None = None
    ) -> Tensor:
        """As Transformer.forward with a cache of its own: prefill, or, with positions, decoding of one token a row."""
        (B, T), D, floor, floor_qk = tokens.shape, self.head_dim, *self.floors
        rotated, decoding = self.heads + self.kv_heads, positions is not None
        positions = positions if decoding else torch.arange(T)[None]
        cos, sin = rope_tables(positions, self.model.frequencies, self.model.rope_scale)
        turn = torch.complex(cos[..., : D // 2], sin[..., D // 2 :])  # (B or 1, T, 1, D/2)
        turn = turn.to(torch.complex128 if self.embed.dtype == torch.float64 else torch.complex64)
        if decoding:
            length = slots or cache.kv.shape[3]
            mask = torch.zeros(B, 1, 1, length, dtype=self.embed.dtype)
            mask.masked_fill_(torch.arange(length) > positions[..., None, None], -math.inf)
        x = F.embedding(tokens.flatten(), self.embed)  # (B T, H)
        for layer, (gain, qkv, qk_gain, o, mlp_gain, gate_up, down) in enumerate(self.layers):
            qkv = product(normalise(x, floor).mul_(gain), *qkv).view(B, T, -1, D)
            qk = qkv[:, :, :rotated]
            if qk_gain is not None:
                qk.copy_(normalise(qk, floor_qk).mul_(qk_gain))
            torch.view_as_complex(qk.unflatten(-1, (-1, 2))).mul_(turn)
            if decoding:  # the query heads that share a key stand as one key head's queries, so that it is read once
                q = qkv[:, 0, : self.heads].view(B, self.kv_heads, -1, D)
                cache.write(layer, positions, qkv[:, :, self.heads :])
                y = F.scaled_dot_product_attention(q, *cache.read(layer, length), attn_mask=mask)
            else:
                q, k, v = qkv.split((self.heads, self.kv_heads, self.kv_heads), dim=2)
                cache.fill(layer, k, v)
                q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
                y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
            x += product(y.reshape(B * T, -1), *o)
            gate, up = product(normalise(x, floor).mul_(mlp_gain), *gate_up).chunk(2, -1)
            x += product(F.silu(gate).mul_(up), *down)
        return normalise(x, floor).mul_(self.last_gain).view(B, T, -1)


def gain_of(norm: RMSNorm) -> Tensor:
    """What `normalise` leaves of an RMSNorm: its gain times the square root of the size."""
    return norm.weight.detach() * len(norm.weight) ** 0.5


def normalise(x: Tensor, floor: Tensor) -> Tensor:
    """x / sqrt(|x|^2 + floor^2) over the last dimension, in three calls."""
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).hypot_(floor)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (b, I) weight^T + bias -> (b, O) on a CPU: of a packed weight, or of few rows, which is to stream the weight.

    Packed weights have no public name in torch; this is what torch.compile writes. One to three rows are not worth it:
    Intel's library, which torch uses, is at its best then, on the Intel processor measured. On AMD's, 2 or 3 rows are
    up to 4 times faster as W x^T, with x^T a view, and a single one is given to one core only, unless W is cut into a
    batch of matrices.
    """
    if weight.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
    if not AMD or len(x) > 3:
        return F.linear(x, weight, bias)
    if len(x) == 1 and len(weight) % 16 == 0 and weight.is_contiguous():
        y = torch.bmm(weight.view(16, -1, weight.shape[1]), x.contiguous().T.expand(16, -1, 1)).view(1, -1)
    else:
        rows = x.expand(max(2, len(x)), -1).contiguous()  # one row of any other W: twice
        y = torch.mm(weight, rows.T).T[: len(x)].contiguous()
    return y if bias is None else y.add_(bias)


def head_dim_of(config) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def check_config(config) -> None:
    """Refuse by name what the code above does not do, rather than compute something else."""
    if config.model_type not in ("llama", "qwen2", "qwen3"):
        raise InputError(f"model_type {config.model_type!r} is not supported (llama, qwen2 and qwen3 are)")
    rope = config.rope_parameters or {}
    needed = {
        "default": (),
        "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
        "yarn": ("factor",),
    }
    kind = rope.get("rope_type", "default")
    if kind not in needed:
        raise InputError(f"rope_type {kind!r} is not supported ({', '.join(needed)} are)")
    for key in ("rope_theta", *needed[kind]):
        if not isinstance(rope.get(key), (int, float)):
            raise InputError(f"rope_type {kind!r} needs a number {key!r} in the configuration, found {rope.get(key)!r}")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise InputError("partial_rotary_factor is not supported")
    if config.hidden_act != "silu":
        raise InputError(f"hidden_act {config.hidden_act!r} is not supported (silu is)")
    if getattr(config, "use_sliding_window", False) or "sliding_attention" in (
        getattr(config, "layer_types", None) or ()
    ):
        raise InputError("sliding-window attention is not supported")


def choose_device(name: str) -> torch.device:
    """The device a flag names; an empty name takes the GPU where there is one. Raises InputError when it cannot be
    used."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().split(". ")[0]
        raise InputError(f"--device {name}: cannot be used here ({reason})") from None
    return torch.device(name)


def free_memory(device: torch.device) -> int:
    """Bytes that can still be taken: of the device, or of this machine's memory (a guess of 8 GiB off Linux)."""
    if device.type == "cuda":  # what torch keeps for itself without using it can be taken as well
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    meminfo = Path("/proc/meminfo")  # its MemFree would count the files that the system has cached as taken
    return int(re.search(r"MemAvailable:\s+(\d+)", meminfo.read_text())[1]) * 1024 if meminfo.is_file() else 2**33


def checkpoint_folder(path: str | Path, files: tuple[str, ...] = ("*.json", "*.safetensors", "*.jinja")) -> Path:
    """The local folder of a checkpoint given as a folder, as one of those in data/ (`chains/teacher`), or as the name
    of a repository on the Hugging Face hub, of which `files` are downloaded and cached."""
    for folder in (Path(path), HERE / path):
        if folder.is_dir():
            steps = sorted(folder.glob("step_*")) if (folder / "log.jsonl").is_file() else []
            if steps:
                raise InputError(f"{path} is a run's folder; its checkpoints are {', '.join(map(str, steps))}")
            return folder
    there = [str(f) for f in Path(path).parent.glob("*") if f.is_dir()]
    there += [f"{f.parent.parent.name}/{f.parent.name}" for f in HERE.glob("*/*/config.json")]
    near = difflib.get_close_matches(str(path), there, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    if str(path).count("/") != 1 or str(path).startswith((".", "/", "~")):
        raise InputError(f"{path}: no such folder, and not the name of a hub repository (owner/name){hint}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(path), allow_patterns=list(files)))
    except (OSError, ValueError) as error:  # offline, not found, gated, disk full: the hub's own first line says which
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"{path}: not a local folder, and the hub did not give it ({reason}). Without a network, give "
            f"the folder of a local copy{hint}"
        ) from None


def load_config(folder: str | Path):
    from huggingface_hub.errors import StrictDataclassError  # what transformers raises on a field of the wrong kind
    from transformers import AutoConfig

    file = Path(folder) / "config.json"
    if not file.is_file():
        raise InputError(f"{folder}: no config.json there, so it is not a checkpoint folder")
    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as error:
        raise InputError(f"{file}: {' '.join(str(error).split())}") from None
