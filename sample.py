r"""Sampling with a KV cache, by hand: the first half of an on-policy step, and a command line to talk to a checkpoint.

    python sample.py                                    # teacher and student answer a problem of the embedded test set
    python sample.py --model out/step_000020 --index 7  # another checkpoint, another problem
    python sample.py --data chains --prompt $'Zed=Ivy+5\nDan=Hal-8\nIvy=31\nHal=Eve+3\nEve=14\nDan?\n'
    python sample.py --model data/chains/teacher --prompt - < problem.txt

A decode step computes one new token for each of B slots. Three ideas make that enough for training (all rows at once)
and evaluation (more rows than slots):
    1. Each row writes its keys and values at its own positions, so prompts of different lengths need no padding
       between prompt and response.
    2. A row that ends frees its slot for the next prompt; when no prompt is waiting, the living rows close the gaps.
    3. One uniform number per row and position, made from the row's seed, decides every token. So a row does not depend
       on its neighbours, the number of slots, or the cap (but for rounding, where a product's kernel depends on them).

Read in this order: Rollout, KVCache, Decoder, sample_token, generate.
"""

import math
import platform
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from data import InputError, embedded_model, load_jsonl, resolve, run_command
from data.flags import check_flags, flag, parse_flags
from data.ranks import full
from data.tokenizer import Tokenizer, as_trained
from model import Transformer, checkpoint_folder, choose_device, count_flops, head_dim_of, rope_tables, rotate

PREFILL_TOKENS = 2**14  # prompts are read in groups of at most so many tokens, padding included
LENGTH_STEP = 64  # the part of the cache that a decode step reads is rounded up to a multiple of this


@dataclass
class Rollout:
    """B sampled responses. Row i holds its prompt, then its response, then padding (zeros)."""

    tokens: Tensor  # (B, S) int64
    prompt_lens: Tensor  # (B,) int64
    lens: Tensor  # (B,) int64, response tokens, the stop token counted
    finished: Tensor  # (B,) bool: ended with a stop token of its own accord; else it was cut at the cap
    supervised: Tensor  # (B, 2) int64, first and last + 1 of the response positions to learn from
    flop: float = 0.0  # matmul FLOP of sampling them, of the tokens really processed

    @classmethod
    def of(cls, prompts: list[list[int]], responses: list[list[int]], stop_ids: tuple[int, ...]) -> "Rollout":
        """From lists of ids, all of each response supervised."""
        prompt_lens, lens = (torch.tensor([len(x) for x in rows]) for rows in (prompts, responses))
        tokens = torch.zeros(len(prompts), int((prompt_lens + lens).max()), dtype=torch.long)
        for row, prompt, response in zip(tokens, prompts, responses):
            row[: len(prompt) + len(response)] = torch.tensor(prompt + response)
        finished = torch.tensor([bool(r) and r[-1] in stop_ids for r in responses])
        return cls(tokens, prompt_lens, lens, finished, torch.stack((lens * 0, lens), dim=1))

    def num_supervised(self) -> int:
        return int((self.supervised[:, 1] - self.supervised[:, 0]).sum())

    def response(self, i: int) -> list[int]:
        """Ids of response i, the stop token included where there is one."""
        start = int(self.prompt_lens[i])
        return self.tokens[i, start : start + int(self.lens[i])].tolist()

    def text_ids(self, i: int) -> list[int]:
        """Ids of response i without the stop token: the part to read."""
        return self.response(i)[:-1] if self.finished[i] else self.response(i)

    def micro_batches(self, micro_tokens: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Parts of the rollout for the training forward: tokens (b, T), mask (b, T-1), position (n,).

        hidden[:, i] predicts tokens[:, i + 1], so the mask marks the n positions that predict a supervised token: of a
        whole response P-1 .. P+len-2, its own stop token included and nothing of the prompt. position counts from the
        response's start. What follows a row's last supervised token is left out. Rows are packed longest first, at
        most `micro_tokens` tokens together (one row at least), padding included; a row goes with none that is more
        than twice as long, so that little of a part is padding.
        """
        ends = self.prompt_lens + self.supervised[:, 1]
        order = ends.argsort(descending=True, stable=True)
        while len(order):
            length = int(ends[order[0]])
            similar = int((2 * ends[order] >= length).sum())
            size = max(1, min(similar, micro_tokens // length))
            rows, order = order[:size], order[size:]
            at, start = torch.arange(length - 1), self.prompt_lens[rows, None] - 1
            mask = (at >= start + self.supervised[rows, :1]) & (at <= ends[rows, None] - 2)
            yield self.tokens[rows, :length], mask, (at - start)[mask]


class KVCache:
    """Keys and values of every layer: (layers, slots, 2 num_kv_heads, max_len, D), the keys' heads first.

    A position that a row has not written yet may hold what an earlier user of the slot left there; nobody sees it,
    since a row attends up to its own last position only.
    """

    def __init__(self, config, slots: int, max_len: int, device, dtype):
        self.kv_heads = config.num_key_value_heads
        shape = (config.num_hidden_layers, slots, 2 * self.kv_heads, max_len, head_dim_of(config))
        self.kv = torch.zeros(shape, device=device, dtype=dtype)

    def read(self, layer: int, rows: int, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the first `rows` slots and `length` positions, (rows, num_kv_heads, length, D) each."""
        return self.kv[layer, :rows, :, :length].split(self.kv_heads, dim=1)

    def fill(self, layer: int, slots: Tensor, kv: Tensor) -> None:
        """Write kv (n, T, 2 num_kv_heads, D) at the first T positions of n slots."""
        self.kv[layer, slots, :, : kv.shape[1]] = kv.transpose(1, 2)

    def write(self, layer: int, slots: Tensor, positions: Tensor, kv: Tensor) -> None:
        """Write kv (n, 2 num_kv_heads, D), one position (n,) of each of n slots."""
        self.kv[layer, slots, :, positions] = kv

    def move(self, to: int, source: int, length: int) -> None:
        self.kv[:, to, :, :length] = self.kv[:, source, :, :length]


class Decoder:
    """The sampling copy of a model: its weights in the sampling dtype, and the forward that writes token by token.

    q, k and v are one matrix here, as are gate and up, so that a decode step, which reads every weight for a few rows,
    makes few calls. `refresh` copies the trained weights in, to the same addresses, as a CUDA graph needs it. Hidden
    states are the Transformer's, up to rounding. Without gradients.
    """

    def __init__(self, model: Transformer, dtype=None, vocab: int | None = None, device=None):
        """dtype, device: by default the model's. vocab: the number of real tokens; ids beyond it are never sampled."""
        self.config, self.dtype = model.config, dtype or model.head.dtype
        self.device = torch.empty(0, device=device or model.head.device).device  # "cuda" is cuda:0 from here on
        self.vocab = vocab or len(model.head)
        self.heads, self.kv_heads = model.config.num_attention_heads, model.config.num_key_value_heads
        self.head_dim, self.eps = head_dim_of(model.config), model.config.rms_norm_eps
        self.frequencies, self.rope_scale = model.frequencies.to(self.device), model.rope_scale
        self.cache = None
        self.graphs: dict | None = None  # {} asks for CUDA graphs of the decode steps; see `next_tokens`
        self.weights = [
            {name: torch.empty(sum(map(len, parts)), *parts[0].shape[1:], dtype=self.dtype, device=self.device)
             for name, parts in group.items()}
            for group in self.groups(model)
        ]
        if model.config.tie_word_embeddings:
            self.weights[-1]["head"] = self.weights[-1]["embed"][: self.vocab]
        self.refresh(model)

    @classmethod
    def from_pretrained(cls, path: str, device, dtype: torch.dtype, vocab: int | None = None) -> "Decoder":
        """Of a checkpoint, through memory-mapped files, so that the device holds the weights once."""
        return cls(Transformer.from_pretrained(path, "cpu", dtype), dtype, vocab, device)

    @property
    def head(self) -> Tensor:
        return self.weights[-1]["head"]  # (vocab, H)

    def groups(self, model: Transformer) -> Iterator[dict[str, list[Tensor]]]:
        """The model's parameters, one dictionary a layer and then one for the rest: those in one list are joined."""
        def weight(module, name: str = "weight") -> Tensor:
            return full(getattr(module, name).detach().to(self.dtype))  # of a sharded model, gathered layer by layer

        for block in model.model.layers:
            a, m = block.self_attn, block.mlp
            modules = {
                "norm": [block.input_layernorm], "qkv": [a.q_proj, a.k_proj, a.v_proj], "o": [a.o_proj],
                "mlp_norm": [block.post_attention_layernorm], "gate_up": [m.gate_proj, m.up_proj],
                "down": [m.down_proj],
            }
            group = {name: [weight(x) for x in xs] for name, xs in modules.items()}
            group |= {f"{name}_bias": [weight(x, "bias") for x in xs] for name, xs in modules.items()
                      if getattr(xs[0], "bias", None) is not None}
            if hasattr(a, "q_norm"):  # one gain for every head of q and of k
                group["qk_norm"] = [weight(a.q_norm).expand(a.heads, -1), weight(a.k_norm).expand(a.kv_heads, -1)]
            yield group
        rest = {"embed": [weight(model.model.embed_tokens)], "norm": [weight(model.model.norm)]}
        if not model.config.tie_word_embeddings:
            rest["head"] = [weight(model.lm_head)[: self.vocab]]
        yield rest

    def refresh(self, model: Transformer) -> None:
        """Copy the model's weights in, after an optimizer step."""
        for mine, parts_by_name in zip(self.weights, self.groups(model)):
            for name, parts in parts_by_name.items():
                for piece, p in zip(mine[name].split([len(p) for p in parts]), parts):
                    piece.copy_(p)
            pack(mine)

    def cache_for(self, slots: int, max_len: int) -> KVCache:
        """One cache for the whole run: made anew only when a larger one is needed."""
        _, old_slots, _, old_len, _ = (0,) * 5 if self.cache is None else self.cache.kv.shape
        if slots > old_slots or max_len > old_len:
            max_len = math.ceil(max(max_len, old_len) / LENGTH_STEP) * LENGTH_STEP
            self.cache, self.graphs = None, None if self.graphs is None else {}  # freed before the new one is made
            self.cache = KVCache(self.config, max(slots, old_slots), max_len, self.device, self.dtype)
        return self.cache

    def __call__(self, tokens: Tensor) -> Tensor:
        """What Transformer.forward returns, so that a Decoder can be the teacher."""
        return self.prefill(tokens)

    @torch.no_grad()
    def prefill(self, tokens: Tensor, cache: KVCache | None = None, slots: Tensor | None = None) -> Tensor:
        """Read whole sequences, padded on the right: tokens (B, T) -> hidden states (B, T, H), those that
        Transformer.forward returns. With a cache, keys and values are also written to its slots (B,)."""
        B, T = tokens.shape

        def attend(layer: int, qkv: Tensor) -> Tensor:
            qkv = qkv.view(B, T, -1, self.head_dim)
            if cache is not None:
                cache.fill(layer, slots, qkv[:, :, self.heads :])
            q, k, v = qkv.transpose(1, 2).split((self.heads, self.kv_heads, self.kv_heads), dim=1)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.heads != self.kv_heads)
            return y.transpose(1, 2)  # (B, T, heads, D)

        positions = torch.arange(T, device=tokens.device).repeat(B)
        return self.run_layers(tokens.flatten(), positions, attend).view(B, T, -1)

    @torch.no_grad()
    def step(self, tokens: Tensor, positions: Tensor, cache: KVCache, length: int) -> Tensor:
        """Write one token a slot: tokens (B,) at positions (B,) of the cache's first B slots -> hidden states (B, H).
        length: positions of the cache to read, as many as the longest row has."""
        B, slots = len(tokens), torch.arange(len(tokens), device=tokens.device)
        unseen = torch.arange(length, device=tokens.device) > positions[:, None, None, None]  # (B, 1, 1, length)
        mask = torch.zeros_like(unseen, dtype=self.dtype).masked_fill_(unseen, -math.inf)

        def attend(layer: int, qkv: Tensor) -> Tensor:
            cache.write(layer, slots, positions, qkv[:, self.heads :])
            # Grouped heads: the query heads of a group stand as several positions, so that each key is read once.
            q = qkv[:, : self.heads].view(B, self.kv_heads, -1, self.head_dim)
            return F.scaled_dot_product_attention(q, *cache.read(layer, B, length), attn_mask=mask)

        return self.run_layers(tokens, positions, attend)

    @torch.no_grad()
    def next_tokens(self, tokens: Tensor, positions: Tensor, uniform: Tensor, length: int, *how) -> Tensor:
        """A decode step and the tokens (B,) it samples; uniform (B,) and how: what sample_token takes besides logits.

        A decode step is some hundred kernels, and starting them one by one from Python takes a GPU longer than they
        run. With `graphs`, the kernels of each (rows, length) are recorded once and started together from then on. They
        read and write where they did when they were recorded, so what changes between steps is copied there first.
        """
        def run(tokens, positions, uniform):
            return sample_token(self.logits(self.step(tokens, positions, self.cache, length)), uniform, *how)

        if self.graphs is None:
            return run(tokens, positions, uniform)
        key = len(tokens), length, how
        if key not in self.graphs:
            inputs = [x.clone() for x in (tokens, positions, uniform)]
            run(*inputs)  # libraries set themselves up in their first call, which must not be recorded
            graph, others = torch.cuda.CUDAGraph(), list(self.graphs.values())
            with torch.cuda.graph(graph, pool=others[0][0].pool() if others else None):  # scratch memory for all
                self.graphs[key] = graph, inputs, run(*inputs)
        graph, inputs, sampled = self.graphs[key]
        for x, new in zip(inputs, (tokens, positions, uniform)):
            x.copy_(new)
        graph.replay()
        return sampled

    def run_layers(self, tokens: Tensor, positions: Tensor, attend: Callable[[int, Tensor], Tensor]) -> Tensor:
        """tokens (n,) at positions (n,) -> hidden states (n, H). attend(layer, qkv) gets queries, keys and values,
        (n, heads + 2 kv_heads, D), the first two rotated, and returns heads * D attended values a token."""
        *layers, rest = self.weights
        n, rotated = len(tokens), self.heads + self.kv_heads
        x = F.embedding(tokens, rest["embed"])
        cos, sin = rope_tables(positions, self.frequencies, self.rope_scale, self.dtype)  # (n, 1, D)
        for layer, w in enumerate(layers):
            h = F.rms_norm(x, x.shape[1:], w["norm"], self.eps)
            qkv = linear(h, w, "qkv").view(n, -1, self.head_dim)
            qk = qkv[:, :rotated]
            if "qk_norm" in w:
                qk = F.rms_norm(qk, qk.shape[2:], None, self.eps) * w["qk_norm"]
            qkv[:, :rotated] = rotate(qk, cos, sin)
            y = attend(layer, qkv).reshape(n, -1)
            x += linear(y, w, "o")
            h = F.rms_norm(x, x.shape[1:], w["mlp_norm"], self.eps)
            gate, up = linear(h, w, "gate_up").chunk(2, dim=-1)
            x += linear(F.silu(gate).mul_(up), w, "down")
        return F.rms_norm(x, x.shape[1:], rest["norm"], self.eps)

    def logits(self, hidden: Tensor) -> Tensor:
        """(n, H) -> (n, vocab), in float32 or wider: rounded to half precision, likely tokens would tie."""
        if hidden.is_cuda and hidden.dtype.itemsize < 4:
            return torch.mm(hidden, self.head.T, out_dtype=torch.float32)
        return linear(hidden, self.weights[-1], "head").to(torch.promote_types(self.dtype, torch.float32))


def linear(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    """x (n, I) -> (n, O) by a matrix of a layer and its bias, if it has one."""
    if name + "_packed" in weights and len(x) >= 4:
        return torch.ops.mkldnn._linear_pointwise.default(
            x, weights[name + "_packed"], weights.get(name + "_bias"), "none", [], ""
        )
    return F.linear(x, weights[name], weights.get(name + "_bias"))


def pack(weights: dict[str, Tensor]) -> None:
    """On an x86 CPU in float32, lay the large matrices out as oneDNN wants them, beside the plain ones: it makes a
    decode step of 4 rows or more faster. torch has no public name for it; this is what torch.compile emits."""
    if platform.machine() in ("x86_64", "AMD64") and torch.backends.mkldnn.is_available():
        for name in weights.keys() & {"qkv", "o", "gate_up", "down", "head"}:
            w = weights[name]
            if w.dtype == torch.float32 and w.device.type == "cpu" and w.numel() >= 2**18:
                weights[name + "_packed"] = torch.ops.mkldnn._reorder_linear_weight(w)


def sample_token(
    logits: Tensor, uniform: Tensor, temperature: float, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """One token a row by inverting the cumulative distribution: logits (B, V), uniform (B,) in [0, 1) -> ids (B,).
    temperature 0 takes the most likely token."""
    if temperature == 0:
        return logits.argmax(-1)
    x = (logits - logits.amax(-1, keepdim=True)).div_(temperature)
    if top_k is not None and top_k < x.shape[-1]:
        x.masked_fill_(x < x.topk(top_k, dim=-1).values[:, -1:], -math.inf)
    if top_p is not None and top_p < 1:
        ordered, order = x.softmax(-1).sort(-1, descending=True)
        beyond = ordered.cumsum(-1) - ordered >= top_p  # the tokens before this one hold enough already
        x.masked_fill_(torch.zeros_like(beyond).scatter_(-1, order, beyond), -math.inf)
    cumulative = x.exp_().double().cumsum(-1)  # in float32 the rare tokens of a large vocabulary would get lost
    total = cumulative[:, -1:]
    below = torch.minimum(uniform[:, None] * total, total * (1 - 1e-15))  # so that no token of probability 0 is taken
    token = torch.searchsorted(cumulative, below, right=True)[:, 0]  # the first whose cumulative is above
    return token.clamp_(max=logits.shape[-1] - 1)  # beyond only where logits are not finite


@torch.no_grad()
def generate(
    decoder: Decoder,
    prompts: list[list[int]],
    max_new_tokens: int,
    stop_ids: tuple[int, ...],
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    *,
    seeds: list[int] | None = None,
    slots: int | None = None,
    progress: bool = False,
) -> Rollout:
    """Sample a response to every prompt, at most `max_new_tokens` long; a row ends early when it samples one of
    `stop_ids`. No token beyond the cap is ever computed.

    temperature: 0 takes the most likely token. top_k, top_p cut the distribution and are for evaluation: the loss of
        training assumes plain sampling.
    seeds: one a row, by default 0, 1, 2, ... A row's randomness depends on its seed and the position alone.
    slots: rows decoded at once; by default all, but at most 256, since from there on twice the rows take twice as long.
    Raises ValueError on an empty prompt, max_new_tokens < 1, or a wrong number of seeds, and InputError where prompt
    and response exceed the model's positions.
    """
    if not prompts or not all(prompts):
        raise ValueError("every prompt needs at least one token")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, found {max_new_tokens}")
    seeds = list(range(len(prompts))) if seeds is None else seeds
    if len(seeds) != len(prompts):
        raise ValueError(f"seeds has {len(seeds)} entries for {len(prompts)} rows")
    longest, positions = max(map(len, prompts)), decoder.config.max_position_embeddings
    if longest + max_new_tokens > positions:
        raise InputError(f"--max_new_tokens {max_new_tokens} and the longest prompt, {longest} tokens, exceed the "
                         f"{positions} positions of the model")
    device, cap, how = decoder.device, max_new_tokens, (temperature, top_k, top_p)
    slots = min(slots or 256, len(prompts))
    cache, stops = decoder.cache_for(slots, longest + cap), torch.tensor(stop_ids, dtype=torch.long, device=device)
    # Finding out which rows have ended waits for a GPU, so it is done now and then; ended rows compute on, ignored.
    check_every = 1 if device.type == "cpu" else 16

    # The state of the slots. Slots whose row has ended write into the column `cap` of ids, which nobody reads.
    token, prompt_len, count = torch.zeros(3, slots, dtype=torch.long, device=device)  # count: of tokens but the newest
    active = torch.zeros(slots, dtype=torch.bool, device=device)
    ids = torch.zeros(slots, cap + 1, dtype=torch.long, device=device)
    noise = torch.zeros(slots, cap + 1, dtype=torch.float64, device=device)
    busy: dict[int, tuple[int, int]] = {}  # slot -> its row, and the step in which the row got there

    queue, step, responses = deque(range(len(prompts))), 0, [[] for _ in prompts]
    bar = tqdm(desc="sample", unit=" tok", leave=False, disable=not progress)
    while True:
        # Refill free slots, several at once: reading one prompt alone takes as long as reading four together.
        free = [s for s in range(len(count)) if s not in busy]
        if queue and 8 * len(free) >= slots:
            filled = [(s, queue.popleft()) for s in free[: len(queue)]]
            busy |= {s: (i, step) for s, i in filled}
            size = max(1, PREFILL_TOKENS // longest)
            for part in (filled[k : k + size] for k in range(0, len(filled), size)):
                lens = torch.tensor([len(prompts[i]) for _, i in part])
                tokens = torch.zeros(len(part), int(lens.max()), dtype=torch.long)
                for row, (_, i) in zip(tokens, part):
                    row[: len(prompts[i])] = torch.tensor(prompts[i])
                uniform = [torch.rand(cap, generator=torch.Generator().manual_seed(seeds[i]), dtype=torch.float64)
                           for _, i in part]
                at = torch.tensor([s for s, _ in part], device=device)
                prompt_len[at], noise[at, :cap] = lens.to(device), torch.stack(uniform).to(device)
                count[at], active[at] = 0, True
                hidden = decoder.prefill(tokens.to(device), cache, at)  # (b, T, H)
                last = hidden[torch.arange(len(part), device=device), prompt_len[at] - 1]
                token[at] = sample_token(decoder.logits(last), noise[at, 0], *how)

        # Every slot has a new token. It will be fed back at the position after those its row has.
        ids.scatter_(1, torch.where(active, count, cap)[:, None], token[:, None])
        position = (prompt_len + count).clamp_(max=longest + cap - 1)
        count += active
        active &= ~torch.isin(token, stops) & (count < cap)
        step += 1

        # Check which rows have ended: now and then, and always when one reaches the cap.
        if step % check_every == 0 or step - min(start for _, start in busy.values()) == cap:
            going, counts = torch.stack((active.long(), count)).tolist()
            ended = [s for s in busy if not going[s]]
            for s, sampled in zip(ended, ids[ended].tolist() if ended else ()):
                responses[busy.pop(s)[0]] = sampled[: counts[s]]
            bar.update(sum(map(len, responses)) + sum(counts[s] for s in busy) - bar.n)
            if not busy and not queue:
                break
            if not busy:
                continue
            # The queue is empty: close the gaps. Not every gap at once, since moving a row copies its cache; and to
            # few numbers of rows, if for each a graph is recorded.
            size = len(busy) if decoder.graphs is None else 2 ** (len(busy) - 1).bit_length()
            if not queue and 8 * size <= 7 * len(count):
                order = sorted(range(len(count)), key=lambda s: s not in busy)[:size]  # the living first
                for to, s in enumerate(order[: len(busy)]):
                    if to != s:
                        cache.move(to, s, len(prompts[busy[s][0]]) + step - busy[s][1])
                token, position, prompt_len, count, active, ids, noise = (
                    x[order] for x in (token, position, prompt_len, count, active, ids, noise)
                )
                busy = {to: busy[s] for to, s in enumerate(order) if s in busy}

        # Feed the tokens back: one decode step. What lies beyond the longest row in the cache is not read.
        length = max(len(prompts[i]) + step - start for i, start in busy.values())
        uniform = noise.gather(1, count[:, None])[:, 0]
        token = decoder.next_tokens(token, position, uniform, math.ceil(length / LENGTH_STEP) * LENGTH_STEP, *how)
    bar.close()
    rollout = Rollout.of(prompts, responses, stop_ids)
    fed = (rollout.prompt_lens + rollout.lens - 1).double()  # the last token is never fed back
    pairs, heads = (fed * (fed + 1)).sum() / 2, rollout.lens.sum()
    rollout.flop = float(count_flops(decoder.config, fed.sum(), pairs, heads))
    return rollout


@dataclass
class Config:
    model: str = flag("", "checkpoint folder or hub name; empty shows the teacher and the student of --data")
    prompt: str = flag("", "your own prompt, or - to read it from standard input; empty takes a problem of --data")
    data: str = flag("search", "data set the problem comes from: a name or a .jsonl file; by default a "
                     "checkpoint's own")
    index: int = flag(0, "which problem of the test set", least=0)
    lines: int = flag(40, "lines of a response to show, most of them from its beginning; 0 shows all", least=0)
    chat: str = flag("auto", "auto: through the chat template where there is one; on: demand it; off: the bare prompt")
    system: str = flag("", "text of a system turn before the prompt, for checkpoints with a chat template")
    thinking: str = flag("", "on or off, for chat templates that have the switch")
    stop_tokens: str = flag("", "stop tokens besides those the checkpoint declares, comma-separated names or ids")
    max_new_tokens: int = flag(4096, "cap on the response", least=1)
    temperature: float = flag(0.0, "0 takes the most likely token, 1 samples from the model's own distribution",
                              least=0, below=math.inf)
    top_k: int = flag(0, "sample among the k most likely tokens only; 0 is off", least=0)
    top_p: float = flag(1.0, "sample among the most likely tokens that hold this much probability; 1 is off",
                        above=0, most=1)
    num_samples: int = flag(1, "responses per model; at --temperature 0 they are all the same", least=1)
    seed: int = flag(1337, "seed of the sampling", least=0)
    device: str = flag("", "cpu, cuda, ...; empty chooses")


def main(config: Config) -> None:
    check_flags(config)
    answer = None
    if config.model:
        as_trained(config, checkpoint_folder(config.model))
    if config.prompt:
        prompt = sys.stdin.read() if config.prompt == "-" else config.prompt
    else:
        rows = load_jsonl(resolve(config.data, "test"), need=("prompt",))
        if config.index >= len(rows):
            raise InputError(f"--index {config.index}: the data has rows 0 to {len(rows) - 1}")
        prompt, answer = rows[config.index]["prompt"], rows[config.index].get("answer")
    device, names = choose_device(config.device), ("teacher", "student")
    paths = [config.model] if config.model else [embedded_model(config.data, name, "model") for name in names]
    print(prompt.rstrip("\n") + (f"\n(the answer is {answer})" if answer is not None else ""))
    for path in paths:
        folder = checkpoint_folder(path)
        tokenizer = Tokenizer(folder, config.chat, config.system, config.thinking)
        ids = tokenizer.encode_prompt(prompt)
        if not ids:
            raise InputError("--prompt: nothing in it, and this tokenizer puts nothing before it")
        if config.prompt and not prompt.endswith("\n") and not tokenizer.chats():
            print("note: the prompt does not end with a newline; the embedded models expect one")
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        decoder = Decoder.from_pretrained(folder, device, dtype, tokenizer.vocab_size)
        stop_ids = (*tokenizer.stop_ids, *tokenizer.stop_ids_of(config.stop_tokens))
        start = time.perf_counter()
        rollout = generate(
            decoder, [ids] * config.num_samples, config.max_new_tokens, stop_ids, config.temperature,
            config.top_k or None, config.top_p, seeds=[config.seed + i for i in range(config.num_samples)],
            progress=True,
        )
        seconds = time.perf_counter() - start
        for i in range(config.num_samples):
            print(f"\n--- {path}" + f", sample {i}" * (config.num_samples > 1))
            print(shorten(tokenizer.decode(rollout.text_ids(i)), config.lines))
            how = "stopped by itself" if rollout.finished[i] else "cut at the cap"
            print(f"[{int(rollout.lens[i])} tokens, {how}]")
        total = int(rollout.lens.sum())
        print(f"[{len(ids)} prompt, {total} response tokens; {seconds:.2f} s, {total / seconds:,.0f} tok/s]")


def shorten(text: str, lines: int) -> str:
    """The first three quarters of `lines` lines and the last quarter, where there are more; 0 keeps all."""
    found, tail = text.split("\n"), lines // 4
    if not lines or len(found) <= lines + 1:
        return text
    return "\n".join([*found[: lines - tail], f"[... {len(found) - lines} lines ...]", *found[len(found) - tail :]])


if __name__ == "__main__":
    run_command(main, parse_flags(Config, __doc__))
