"""A decoder-only transformer that reads and writes Hugging Face checkpoints of the Qwen2/2.5, Qwen3 and Llama families.

The module tree spells the Hugging Face parameter names (`model.layers.0.self_attn.q_proj.weight`, ...), so a checkpoint
is loaded and saved without a table of names. There is one `forward`: for whole sequences, and, given a KV cache
(sample.py), for the prompts or the one newest token of some rows. It returns hidden states, not logits: the head is a
(V, H) matrix that sampling applies to one position per row and the loss applies chunk by chunk, so that a (B, T, V)
tensor never exists.

    model = Transformer.from_pretrained("data/chains/teacher")
    hidden = model(tokens)                 # (B, T) -> (B, T, H)
    logits = hidden @ model.head.T         # (B, T, V), for those who can afford it

Read in this order: RMSNorm, rotary embedding, Attention, MLP, Block, Transformer; then teachers of other families, how
a large model is sharded, what a model costs, and which device it runs on.
"""

import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from data import InputError, reading
from data.checkpoint import FAMILIES, checkpoint_folder, head_dim_of, load_config, weight_files, write_config
from data.ranks import full_tensor, world_size


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        # Under autocast x is narrower than the weights, and the norm is better taken in float32.
        return F.rms_norm(x.to(self.weight.dtype), self.weight.shape, self.weight, self.eps)


def rope_frequencies(config) -> tuple[Tensor, float]:
    """The rotary frequencies, float32 (D/2,), in radians per token, and a factor on cos and sin.

    Pair i of features turns by theta^(-2i/D) per token. The scaling kinds slow down the pairs that turn so slowly that
    they did not complete a turn in the context of pretraining, so that longer contexts show them no angle they have not
    seen: linear divides all frequencies alike; llama3 divides the slow ones, keeps the fast ones and interpolates
    between, by wavelength; yarn (arXiv 2309.00071) the same by feature index, and sharpens attention by the factor.
    """
    rope, D = config.rope_parameters, head_dim_of(config)
    theta, kind = rope["rope_theta"], rope.get("rope_type", "default")
    freq = theta ** (-torch.arange(0, D, 2, dtype=torch.float32, device="cpu") / D)  # also within torch.device("meta")
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
    # yarn: the index of the pair of features that completes so many turns in the original context
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


def rope_tables(positions: Tensor, frequencies: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotary angles at positions (..., T): (..., T, 1, D). Features i and i + D/2 are a pair and
    turn by the same angle; the first half of the sines is negative, as `rotate` wants them."""
    angles = positions[..., None].float() * frequencies  # (..., T, D/2)
    cos, sin = angles.cos() * scale, angles.sin() * scale
    cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
    return cos.unsqueeze(-2).to(dtype), sin.unsqueeze(-2).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (a, b) = (x_i, x_{i+D/2}) of x (B, T, heads, D) to (a cos - b sin, b cos + a sin)."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Every token sees itself and what stands before it: (B, heads, T, D) -> (B, heads, T, D)."""
    if q.is_cuda and q.dtype == torch.float32:  # there, no kernel takes grouped heads without a (T, T) matrix
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


class Attention(nn.Module):
    """Self-attention with grouped heads: each key and value head serves several query heads."""

    def __init__(self, config):
        super().__init__()
        self.head_dim = D = head_dim_of(config)
        q_size, kv_size = config.num_attention_heads * D, config.num_key_value_heads * D
        bias = config.model_type == "qwen2" or bool(getattr(config, "attention_bias", False))
        out_bias = config.model_type != "qwen2" and bias  # Qwen2 has biases on q, k and v but not on o
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=bias)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=out_bias)
        if config.model_type == "qwen3":  # QK-norm: each head's query and key are normalised before they are rotated
            self.q_norm, self.k_norm = RMSNorm(D, config.rms_norm_eps), RMSNorm(D, config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Callable = causal) -> Tensor:
        """attend: from q (B, heads, T, D), k and v (B, kv_heads, T, D), rotated, to what each query reads."""
        B, T, _ = x.shape
        q, k, v = (proj(x).view(B, T, -1, self.head_dim) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        y = attend(*(t.transpose(1, 2).to(v.dtype) for t in (q, k, v)))  # autocast leaves q and k wider than v
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


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
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Callable = causal) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class Transformer(nn.Module):
    """`config` is a transformers configuration of one of the supported families."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.vocab = config.vocab_size  # the tokenizer may have fewer ids; rows of the head beyond them are padding
        self.frequencies, self.rope_scale = rope_frequencies(config)  # no buffers: models are built on "meta" first
        self.recompute = False  # compute activations again in backward: less memory, a third more FLOP
        self.cache = self.graphs = None  # sample.py keeps its KV cache here, and CUDA graphs if `graphs` is a dict
        self.model = nn.Module()  # the Hugging Face trees put everything but the head under "model."
        self.model.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.model.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.model.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head(self) -> Tensor:
        """The (V, H) matrix that turns hidden states into logits; the embedding itself when the two are tied."""
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    @property
    def device(self) -> torch.device:
        return self.head.device

    def forward(self, tokens: Tensor, positions: Tensor | None = None, cache=None) -> Tensor:
        """Hidden states after the final norm: tokens (B, T) -> (B, T, H).

        Every token sees itself and what stands before it in its row, so rows of different lengths are padded on the
        right, where padding is not seen. positions (B, T): by default 0, 1, 2, ... cache: sample.py's KVCache, which
        was told before whether whole prompts come or one token per row; it writes their keys and values, and attends.
        """
        x = self.model.embed_tokens(tokens)
        if self.frequencies.device != tokens.device:
            self.frequencies = self.frequencies.to(tokens.device)
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)
        cos, sin = rope_tables(positions, self.frequencies, self.rope_scale, x.dtype)  # (T, 1, D) or (B, T, 1, D)
        for layer, block in enumerate(self.model.layers):
            if cache is not None:
                x = block(x, cos, sin, partial(cache.attend, layer))
            elif self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, cos, sin, use_reentrant=False)
            else:
                x = block(x, cos, sin)
        return self.model.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of real tokens only, to sample from: (n, H) -> (n, vocab), in float32 or wider. On a GPU never rounded
        to half precision, in which likely tokens would tie."""
        head = self.head[: self.vocab]
        if hidden.is_cuda and hidden.dtype.itemsize < 4:
            return torch.mm(hidden, head.T, out_dtype=torch.float32)
        return F.linear(hidden, head).to(torch.promote_types(hidden.dtype, torch.float32))

    def initialize(self, seed: int) -> "Transformer":
        """Fresh weights from a seed, for training from scratch.

        Matrices are normal with variance 1 / fan-in, but o_proj and down_proj start at zero, so that every block is the
        identity at first; gains of QK-norm start at 2. The embedded tasks are learned faster from there than from the
        families' own normal(0, 0.02).
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

        Tensors are read one by one from memory-mapped files, and the model is built around them, so peak memory is one
        copy of the weights. Raises InputError when the folder is no checkpoint, the architecture is not supported, or a
        tensor is missing, unknown, of the wrong shape or not finite.
        """
        folder, weights = checkpoint_folder(path), {}
        config = load_config(folder)
        for file in weight_files(folder):
            with reading(file), safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118
                    if not name.endswith("rotary_emb.inv_freq"):  # in some old Llama checkpoints
                        weights[name] = tensors.get_tensor(name).to(device).to(dtype)
        # Some tied checkpoints store the shared matrix twice. Where the two differ, they are not tied.
        head, embedding = (weights.get(name) for name in ("lm_head.weight", "model.embed_tokens.weight"))
        if config.tie_word_embeddings and head is not None:
            config.tie_word_embeddings = embedding is not None and torch.equal(head, embedding)
            if config.tie_word_embeddings:
                del weights["lm_head.weight"]
        with torch.device("meta"):
            model = cls(config)
        with reading(folder):  # torch names the tensors that are missing, unknown or of another shape
            model.load_state_dict(weights, assign=True)
        model.frequencies = model.frequencies.to(device)
        for name, weight in weights.items():
            if not weight.isfinite().all():
                raise InputError(f"{path}: {name} is not finite: the run that wrote it failed, or the file is damaged")
        return model

    @classmethod
    def frozen(cls, path: str, device: torch.device, vocab: int, dtype: torch.dtype | None = None):
        """A checkpoint that samples and scores but is not trained: without gradients, by default in bfloat16 on a GPU
        and in float32 elsewhere. vocab: how many of its rows are tokens."""
        model = cls.from_pretrained(path, device, dtype or default_dtype(device)).requires_grad_(False)
        model.vocab = vocab
        return model

    @torch.no_grad()
    def copy_from(self, trained: "Transformer") -> None:
        """Take over the weights of a model, sharded or not, after its optimizer's step."""
        for mine, new in zip(self.parameters(), trained.parameters()):
            mine.copy_(full_tensor(new))

    def save_pretrained(self, folder: str | Path, weights: dict[str, Tensor] | None = None) -> None:
        """Write config.json and model.safetensors; transformers and vLLM load the folder as it is. weights: the whole
        ones by name, where the model itself is sharded."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_config(self.config, folder, self.head.dtype)
        weights = weights or {name: p.detach() for name, p in self.named_parameters()}
        weights = {name: w.cpu().contiguous() for name, w in weights.items()}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


# --- a teacher of another family


class OtherFamily(nn.Module):
    """A teacher that the code above does not know, as transformers builds it. It scores whole sequences, which takes
    its last hidden states and its head, and does not sample.

    Raises InputError where its logits are not head times hidden state, because it scales or caps them.
    """

    def __init__(self, path: str, device: torch.device, vocab: int, dtype: torch.dtype):
        super().__init__()
        from transformers import AutoModelForCausalLM

        folder = checkpoint_folder(path)
        weight_files(folder)  # safetensors, or refused
        with reading(folder):
            whole, info = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True)
            whole = whole.to(device).requires_grad_(False)
        if missing := sorted(info["missing_keys"]):
            raise InputError(f"{path}: tensor {missing[0]} is missing (and {len(missing) - 1} more)")
        self.body, self.head, self.vocab = whole.base_model, whole.get_output_embeddings().weight, vocab
        self.config = whole.config.get_text_config()
        for name in ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier"):
            if getattr(self.config, name, None) not in (None, 1, 1.0):
                raise InputError(f"--teacher {path}: its {name} changes its logits, which is not supported")
        tokens = torch.arange(8, device=device)[None]
        expected, found = whole(tokens).logits.float(), (self(tokens) @ self.head.T).float()
        if not (found - expected).norm() < 0.01 * expected.norm():
            raise InputError(f"--teacher {path}: the logits of a {self.config.model_type} model are not its head times "
                             "its last hidden state, which is not supported")

    device, logits = Transformer.device, Transformer.logits  # both need only `head` and `vocab`

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T) -> (B, T, H), as Transformer.forward."""
        return self.body(input_ids=tokens, use_cache=False).last_hidden_state


def load_teacher(path: str, device: torch.device, vocab: int, dtype: torch.dtype | None = None) -> nn.Module:
    if load_config(checkpoint_folder(path), any_family=True).model_type in FAMILIES:
        return Transformer.frozen(path, device, vocab, dtype)
    return OtherFamily(path, device, vocab, dtype or default_dtype(device))


# --- a model that is too large for one device


def shard(model: Transformer, group: int, dtype: torch.dtype) -> Transformer:
    """Split the model over groups of `group` ranks, and keep a copy in each group (torch's FSDP2). Afterwards a
    parameter is a DTensor that holds one rank's part; forward gathers a block's weights when it comes to it, in
    `dtype`, and backward leaves the sum over all ranks of the gradients, in float32.

    Embedding, final norm and head are gathered together by forward and stay so until backward ends: read `head` after
    forward. All ranks must run forward and backward equally often, since they wait for each other there. A model that
    is trained must not run forward alone: the weights it gathered would be used again after the optimizer's step.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(model.device.type, (world_size() // group, group), mesh_dim_names=("replicate", "shard"))
    half = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    options = {"mesh": mesh, "mp_policy": half if dtype.itemsize < 4 else MixedPrecisionPolicy()}
    for block in model.model.layers:
        fully_shard(block, **options)
    fully_shard(model, reshard_after_forward=False, **options)
    for module in model.modules():
        if isinstance(module, FSDPModule):  # the sum over ranks, not the mean: the loss has been divided already
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return model


# --- what a model costs


def count_flops(config, read: Tensor, num_logits: float) -> float:
    """Matmul FLOP of one forward pass over causal rows: 2 per weight and token, attention, and the head where it is
    applied. A backward pass costs twice its forward.

    read (B,): tokens that each row feeds through the model; token t attends to t positions, so a row of T makes
    T(T+1)/2 pairs, of 4 FLOP per layer and feature. num_logits: positions whose logits are computed.
    """
    H, layers, q_size = config.hidden_size, config.num_hidden_layers, config.num_attention_heads * head_dim_of(config)
    if config.model_type in FAMILIES:
        kv_size = config.num_key_value_heads * head_dim_of(config)
        weights = layers * (2 * H * q_size + 2 * H * kv_size + 3 * H * config.intermediate_size)
    else:
        weights = weights_per_token(config)
    read = read.double()
    pairs = (read * (read + 1) / 2).sum().item()
    return 2 * weights * read.sum().item() + 4 * layers * q_size * pairs + 2 * H * config.vocab_size * num_logits


def without_numbers(config) -> nn.Module:
    """A model of any family, on the meta device."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return Transformer(config) if config.model_type in FAMILIES else AutoModelForCausalLM.from_config(config)


def count_parameters(config) -> int:
    return sum(p.numel() for p in without_numbers(config).parameters())


def weights_per_token(config) -> float:
    """Weights that one token is multiplied with, in a model of another family, without embedding and head; of a layer's
    experts only the share that the token is sent to."""
    if not hasattr(config, "weights_per_token"):  # building a large model takes a while, even without its numbers
        model = without_numbers(config)
        ends = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        counts = (getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts"))
        experts = next(filter(None, counts), None)
        share = config.num_experts_per_tok / experts if experts else 1.0
        config.weights_per_token = sum(
            p.numel() * (share if ".experts." in name else 1)
            for name, p in model.named_parameters() if p.dim() > 1 and not any(p is end for end in ends))
    return config.weights_per_token


# --- the device


def default_dtype(device: torch.device) -> torch.dtype:
    """The dtype of forward passes unless a flag says otherwise."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def choose_device(name: str) -> torch.device:
    """The device a flag names; an empty name takes the GPU where there is one, and each rank of torchrun its own.
    Raises InputError when it cannot be used."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("mps"):
        raise InputError("--device mps: cannot be used, since the loss adds in float64, which Apple's GPUs lack; the "
                         "CPU works (--device cpu)")
    # cuDNN's attention, the first choice on recent cards, plans a kernel for every new shape: seconds at every step
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        if name == "cuda" and "LOCAL_RANK" in os.environ:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        return torch.empty(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().split(". ")[0]
        raise InputError(f"--device {name}: cannot be used here ({reason})") from None


