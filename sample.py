r"""Sampling with a KV cache, by hand: the first half of an on-policy step, and a command line to talk to a checkpoint.

    python sample.py                                    # teacher and student answer a problem of the embedded test set
    python sample.py --model out/step_000020 --index 7  # another checkpoint, another problem
    python sample.py --data chains --prompt $'Zed=Ivy+5\nDan=Hal-8\nIvy=31\nHal=Eve+3\nEve=14\nDan?\n'
    python sample.py --model data/chains/teacher --prompt - < problem.txt

A decode step computes one new token for each row in a slot of the cache. Three ideas make that enough for training (all
rows at once) and evaluation (more rows than slots):
    1. Each row writes its keys and values at its own positions, so prompts of different lengths need no padding
       between prompt and response.
    2. A row that ends leaves its slot to the next prompt; when no prompt is waiting, the other rows close the gaps.
    3. One uniform number per row and position, made from the row's seed, decides every token. So a row does not depend
       on its neighbours, the number of slots, or the cap (but for the last bits, since a matrix product of another size
       rounds differently).

Read in this order: Rollout, KVCache, sample_token, generate; CUDA graphs, the command line and its helpers come last.
"""

import math
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from data import InputError, embedded_model, load_jsonl, resolve, run_command
from data.checkpoint import checkpoint_folder, head_dim_of
from data.flags import flag, parse_flags
from data.tokenizer import Tokenizer, as_trained
from model import Transformer, causal, choose_device, count_flops

PREFILL_TOKENS = 2**14  # prompts are read in groups of at most so many tokens, padding included
LENGTH_STEP = 64  # the part of the cache that a decode step reads is rounded up to a multiple of this
MAX_SLOTS = 256  # rows decoded at once by default: from there on twice the rows take twice as long


@dataclass
class Rollout:
    """B sampled responses. Row i holds its prompt, then its response, then padding (zeros)."""

    tokens: Tensor  # (B, S) int64
    prompt_lens: Tensor  # (B,) int64
    lens: Tensor  # (B,) int64, response tokens, the stop token counted
    finished: Tensor  # (B,) bool: ended with a stop token; else it was cut at the cap
    supervised: Tensor  # (B, 2) int64, first and last + 1 of the response positions to learn from
    flop: float = 0.0  # matmul FLOP of sampling them
    for_teacher: "Rollout | None" = None  # what the teacher reads: its own prompts, then the same responses

    @classmethod
    def of(cls, prompts: list[list[int]], responses: list[list[int]], stop_ids: tuple[int, ...]) -> "Rollout":
        """From lists of ids, all of each response supervised."""
        prompt_lens, lens = (torch.tensor([len(x) for x in rows]) for rows in (prompts, responses))
        tokens = pad_sequence([torch.tensor(p + r) for p, r in zip(prompts, responses)], batch_first=True)
        finished = torch.tensor([bool(r) and r[-1] in stop_ids for r in responses])
        return cls(tokens, prompt_lens, lens, finished, torch.stack((lens * 0, lens), dim=1))

    def with_prompts(self, prompts: list[list[int]]) -> "Rollout":
        """The same responses behind other prompts."""
        tokens = pad_sequence([torch.tensor(p + self.response(i)) for i, p in enumerate(prompts)], batch_first=True)
        return replace(self, tokens=tokens, prompt_lens=torch.tensor([*map(len, prompts)]))

    def num_supervised(self) -> int:
        return int((self.supervised[:, 1] - self.supervised[:, 0]).sum())

    def response(self, i: int) -> list[int]:
        """Ids of response i, the stop token included where there is one."""
        start = int(self.prompt_lens[i])
        return self.tokens[i, start : start + int(self.lens[i])].tolist()

    def text_ids(self, i: int) -> list[int]:
        """Ids of response i without the stop token: the part to read."""
        return self.response(i)[:-1] if self.finished[i] else self.response(i)

    def micro_batches(self, micro_tokens: int) -> Iterator[Tensor]:
        """Indices (b,) of rows to go forward and backward together, longest first: at most `micro_tokens` tokens with
        padding, for the student and for the teacher, or one row. A row goes with none more than twice as long, so that
        little is padding."""
        ends = self.prompt_lens + self.supervised[:, 1]
        if self.for_teacher is not None:
            ends = ends.maximum(self.for_teacher.prompt_lens + self.supervised[:, 1])
        order = ends.argsort(descending=True, stable=True)
        while len(order):
            length = int(ends[order[0]])
            similar = int((2 * ends[order] >= length).sum())
            size = max(1, min(similar, micro_tokens // length))
            rows, order = order[:size], order[size:]
            yield rows

    def part(self, rows: Tensor, device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What a model reads of some rows (b,), and which of its hidden states count: tokens (b, T-1), at (n,), targets
        (n,), on `device`, and position (n,), on the CPU.

        hidden[i, t] predicts tokens[i, t + 1]. `at` are the indices, among all b * (T-1) hidden states, of the n that
        predict a supervised token: of a whole response of L tokens behind P of prompt those at P-1 .. P+L-2, so its
        own stop token is predicted and nothing of the prompt. targets are the tokens predicted; position counts from
        the response's start. (Indices and not a mask: a GPU would have to wait to be told how many are set.)
        """
        if not len(rows):  # a rank without work, which takes part in the others' forward
            none = torch.zeros(0, dtype=torch.long)
            return torch.zeros(1, 1, dtype=torch.long, device=device), none.to(device), none.to(device), none
        prompt_lens = self.prompt_lens[rows, None]  # (b, 1)
        first, end = (prompt_lens + self.supervised[rows]).split(1, dim=1)  # (b, 1) each, from the row's start
        tokens = self.tokens[rows, : int(end.max())]
        t = torch.arange(1, tokens.shape[1])  # indices in the row of the tokens that are predicted
        mask = (first <= t) & (t < end)  # (b, T-1)
        at, targets = mask.flatten().nonzero()[:, 0], tokens[:, 1:][mask]
        return tokens[:, :-1].to(device), at.to(device), targets.to(device), (t - prompt_lens)[mask]


class KVCache:
    """Keys and values of every layer, (layers, slots, num_kv_heads, max_len, D) each. `attend` is what a forward calls
    in place of causal attention, after `write_prompts` or `write_at` has said where its tokens go.

    A position that a row has not written yet may hold what an earlier row left there. The mask gives it weight 0, so
    it does no harm while it is finite.
    """

    def __init__(self, config, slots: int, max_len: int, device, dtype):
        shape = config.num_hidden_layers, slots, config.num_key_value_heads, max_len, head_dim_of(config)
        self.k, self.v = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))

    def write_prompts(self, slots: Tensor) -> None:
        """The next forward reads prompts into some slots (B,), from position 0 on."""
        self.slots, self.positions = slots, None

    def write_at(self, positions: Tensor, length: int) -> None:
        """The next forward adds one token to each of the first B slots, at positions (B,), and sees the first `length`
        positions of the cache, at least as many as the longest row has, each row up to its own."""
        self.positions, self.length = positions, length
        self.slots = torch.arange(len(positions), device=positions.device)
        unseen = torch.arange(length, device=positions.device) > positions[:, None, None, None]  # (B, 1, 1, length)
        # As numbers: from a mask of bools, attention would make them anew in every layer.
        self.mask = torch.zeros_like(unseen, dtype=self.k.dtype).masked_fill_(unseen, -math.inf)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Write k and v (B, num_kv_heads, T, D) and attend with q (B, heads, T, D) -> (B, heads, T, D)."""
        keys, values, (B, kv_heads, T, D) = self.k[layer], self.v[layer], k.shape
        if self.positions is None:
            keys[self.slots, :, :T], values[self.slots, :, :T] = k, v
            return causal(q, k, v)
        keys[self.slots, :, self.positions], values[self.slots, :, self.positions] = k[:, :, 0], v[:, :, 0]
        # Query heads that share a key head are passed as if they were positions, so that each key is read once.
        q = q.view(B, kv_heads, -1, D)
        y = F.scaled_dot_product_attention(q, keys[:B, :, : self.length], values[:B, :, : self.length], self.mask)
        return y.reshape(B, -1, 1, D)  # no view: a GPU's kernels lay y out by (B, heads of a group, kv_heads, D)

    def move(self, to: int, source: int, length: int) -> None:
        for x in (self.k, self.v):
            x[:, to, :, :length] = x[:, source, :, :length]


def cache_for(model: Transformer, slots: int, max_len: int) -> KVCache:
    """The model's cache, made anew only when a larger one is needed, since CUDA graphs go by addresses."""
    _, old_slots, _, old_len, _ = (0,) * 5 if model.cache is None else model.cache.k.shape
    if slots > old_slots or max_len > old_len:
        max_len = math.ceil(max(max_len, old_len) / LENGTH_STEP) * LENGTH_STEP
        model.cache = None  # freed before the new one is made
        if model.graphs is not None:
            model.graphs = {}
        model.cache = KVCache(model.config, max(slots, old_slots), max_len, model.device, model.head.dtype)
    return model.cache


def sample_token(
    logits: Tensor, uniform: Tensor, temperature: float, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """One token per row by inverting the cumulative distribution: logits (B, V), uniform (B,) in [0, 1) -> ids (B,).
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


def row_noise(seeds: list[int], length: int) -> Tensor:
    """Uniform numbers in [0, 1), (rows, length) float64, each row's from its own seed."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return torch.stack([torch.rand(length, generator=g, dtype=torch.float64) for g in generators])


@torch.no_grad()
def generate(
    model: Transformer, prompts: list[list[int]], max_new_tokens: int, stop_ids: tuple[int, ...],
    temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None, *,
    seeds: list[int] | None = None, slots: int | None = None, progress: bool = False,
) -> Rollout:
    """Sample a response to every prompt, at most `max_new_tokens` long; a row ends early when it samples one of
    `stop_ids`. Nothing is computed beyond the cap, as long as all rows start together.

    temperature: 0 takes the most likely token. top_k, top_p cut the distribution and are for evaluation: the loss of
        training assumes plain sampling.
    seeds: one per row, by default 0, 1, 2, ... A row's randomness depends on its seed and the position alone.
    slots: rows decoded at once; by default all, but at most MAX_SLOTS.
    """
    seeds = list(range(len(prompts))) if seeds is None else seeds
    check_arguments(model, prompts, max_new_tokens, seeds)
    N, cap, device, how = len(prompts), max_new_tokens, model.device, (temperature, top_k, top_p)
    longest, slots = max(map(len, prompts)), min(slots or MAX_SLOTS, N)
    cache, stops = cache_for(model, slots, longest + cap), torch.tensor(stop_ids, dtype=torch.long, device=device)
    look_every = 1 if device.type == "cpu" else 16  # a look waits for the GPU; until then ended rows compute on

    # The state is kept by row. A row's next token goes to ids[row, count[row]]: that of an ended row too, where nobody
    # reads it (hence cap + 1 columns). Row N is filler: it pads a batch to the size of a recorded graph, at position 0.
    prompt_len = torch.tensor([*map(len, prompts), 1], device=device)
    count, going = torch.zeros_like(prompt_len), torch.arange(N + 1, device=device) < N
    ids = torch.zeros(N + 1, cap + 1, dtype=torch.long, device=device)
    noise = row_noise([*seeds, 0], cap + 1).to(device)
    held, waiting, started = [N] * slots, deque(range(N)), {}  # held[slot]: its row; started[row]: step it came at
    step = look = 0

    def note(rows: Tensor, token: Tensor) -> None:
        """Append a token (b,) to each of some rows (b,)."""
        n, alive = count[rows], going[rows]
        ids[rows, n] = token
        count[rows] = n + alive
        going[rows] = alive & ~torch.isin(token, stops) & (n + 1 < cap)

    def regroup(free: list[int]) -> list[int]:
        """Fill free slots with waiting rows, whose prompts are read here, or else with the last rows."""
        new = [(slot, waiting.popleft()) for slot in free[: len(waiting)]]
        size = max(1, PREFILL_TOKENS // longest)
        for part in (new[i : i + size] for i in range(0, len(new), size)):
            at, rows = torch.tensor(part, device=device).T
            cache.write_prompts(at)
            prompt_ids = pad_sequence([torch.tensor(prompts[row]) for _, row in part], batch_first=True)
            hidden = model.forward(prompt_ids.to(device), cache=cache)  # (b, T, H)
            last = hidden[torch.arange(len(part), device=device), prompt_len[rows] - 1]
            note(rows, sample_token(model.logits(last), noise[rows, 0], *how))
        started.update((row, step) for _, row in new)
        kept = dict(new) | {slot: row for slot, row in enumerate(held) if slot not in free}
        for gap in sorted(set(range(len(kept))) - set(kept)):
            source = max(kept)
            kept[gap] = row = kept.pop(source)
            cache.move(gap, source, len(prompts[row]) + step - started[row])
        size = len(kept) if model.graphs is None else min(slots, 2 ** (len(kept) - 1).bit_length())  # few graphs
        return [kept.get(slot, N) for slot in range(size)]

    bar = tqdm(desc="sample", unit=" tok", leave=False, disable=None if progress else True)
    while True:
        if step == look:
            alive = going.tolist()  # also true of rows that wait: regroup may start some of them below
            free = [slot for slot, row in enumerate(held) if not alive[row]]
            bar.update(int(count.sum()) - bar.n if progress else 0)
            if len(free) == len(held) and not waiting:
                break
            if 8 * len(free) >= len(held):  # in groups: reading one prompt takes as long as reading four
                held = regroup(free)
                rows = torch.tensor(held, device=device)
            first_full = min(started[row] for row in held if alive[row]) + cap - 1  # step at which a row has `cap`
            ahead = max(len(prompts[row]) - started[row] for row in held if alive[row])  # longest row less `step`
            look = min(step + look_every, first_full)
            if look == step:  # a cap of one token
                continue
        step += 1
        length = math.ceil((ahead + step) / LENGTH_STEP) * LENGTH_STEP  # positions of the cache to read
        newest = count[rows] - 1
        inputs = ids[rows, newest], prompt_len[rows] + newest, noise[rows, newest + 1]
        note(rows, next_tokens(model, *inputs, length, how))
    bar.close()
    rollout = Rollout.of(prompts, [row[:n] for row, n in zip(ids.tolist(), count.tolist()[:N])], stop_ids)
    read = rollout.prompt_lens + rollout.lens - 1  # the last token is never fed back
    rollout.flop = count_flops(model.config, read, rollout.num_supervised())
    return rollout


def next_tokens(
    model: Transformer, tokens: Tensor, positions: Tensor, uniform: Tensor, length: int, how: tuple
) -> Tensor:
    """A decode step: the newest tokens (B,) of the first B slots and their positions (B,) -> the tokens (B,) that
    follow. uniform (B,) and how: what sample_token takes besides logits. length: positions of the cache to read.

    A decode step is some hundred kernels, and starting them one by one from Python takes a GPU longer than they run.
    With `model.graphs`, the kernels of each (rows, length) are recorded once and started together from then on. They
    read and write where they did when they were recorded, so what changes between steps is copied there first.
    """
    def run(tokens: Tensor, positions: Tensor, uniform: Tensor) -> Tensor:
        model.cache.write_at(positions, length)
        hidden = model.forward(tokens[:, None], positions[:, None], model.cache)[:, 0]  # not __call__, for --compile
        return sample_token(model.logits(hidden), uniform, *how)

    if model.graphs is None:
        return run(tokens, positions, uniform)
    key = len(tokens), length, how
    if key not in model.graphs:
        inputs = [x.clone() for x in (tokens, positions, uniform)]
        run(*inputs)  # libraries set themselves up in their first call, which must not be recorded
        graph, others = torch.cuda.CUDAGraph(), list(model.graphs.values())
        pool = others[0][0].pool() if others else None  # scratch memory for all
        with torch.cuda.device(tokens.device), torch.cuda.graph(graph, pool=pool):
            model.graphs[key] = graph, inputs, run(*inputs)
    graph, inputs, sampled = model.graphs[key]
    for x, new in zip(inputs, (tokens, positions, uniform)):
        x.copy_(new)
    graph.replay()
    return sampled


def check_arguments(model: Transformer, prompts: list[list[int]], cap: int, seeds: list[int]) -> None:
    """Raise ValueError on an empty prompt, a cap below 1 or a wrong number of seeds, and InputError where the model
    cannot sample, or prompt and response exceed its positions."""
    if not isinstance(model, Transformer):
        raise InputError(f"a {model.config.model_type} teacher scores, and does not sample: no --mix, no --rollout "
                         "teacher, no teacher_prefix")
    if not prompts or not all(prompts):
        raise ValueError("every prompt needs at least one token")
    if cap < 1:
        raise ValueError(f"max_new_tokens must be at least 1, found {cap}")
    if len(seeds) != len(prompts):
        raise ValueError(f"seeds has {len(seeds)} entries for {len(prompts)} rows")
    longest, positions = max(map(len, prompts)), model.config.max_position_embeddings
    if longest + cap > positions:
        raise InputError(f"--max_new_tokens {cap} and the longest prompt, {longest} tokens, exceed the {positions} "
                         "positions of the model")


@dataclass
class Config:
    typed = ()  # names of the flags that were typed; parse_flags sets it

    model: str = flag("", "checkpoint folder or hub name; empty shows the teacher and the student of --data")
    prompt: str = flag("", "your own prompt, or - to read it from standard input; empty takes a problem of --data")
    data: str = flag("hops", "data set the problem comes from: a name or a .jsonl file; by default a "
                     "checkpoint's own")
    index: int = flag(0, "which problem of the test set", least=0)
    lines: int = flag(40, "lines of a response to show, most of them from its beginning; 0 shows all", least=0)
    chat: str = flag("auto", "auto: through the chat template where there is one; on: demand it; off: the bare prompt")
    system: str = flag("", "text of a system turn before the prompt, for checkpoints with a chat template")
    thinking: str = flag("", "on or off, for chat templates that have the switch", choices=("", "on", "off"))
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
        model = Transformer.frozen(folder, device, tokenizer.vocab_size)
        fit_cap(config, "max_new_tokens", [ids], model.config.max_position_embeddings)
        stop_ids = (*tokenizer.stop_ids, *tokenizer.stop_ids_of(config.stop_tokens))
        start = time.perf_counter()
        rollout = generate(
            model, [ids] * config.num_samples, config.max_new_tokens, stop_ids, config.temperature,
            config.top_k or None, config.top_p, seeds=[config.seed + i for i in range(config.num_samples)],
            progress=True,
        )
        seconds = time.perf_counter() - start
        for i in range(config.num_samples):
            print(f"\n--- {path}" + (f", sample {i}" if config.num_samples > 1 else ""))
            print(shorten(tokenizer.decode(rollout.text_ids(i)), config.lines))
            how = "stopped by itself" if rollout.finished[i] else "cut at the cap"
            print(f"[{int(rollout.lens[i])} tokens, {how}]")
        total = int(rollout.lens.sum())
        print(f"[{len(ids)} prompt, {total} response tokens; {seconds:.2f} s, {total / seconds:,.0f} tok/s]")


def fit_cap(config, name: str, prompts: list[list[int]], positions: int, where: str = "") -> None:
    """Lower the flag `name`, a cap on responses, to what a model of so many positions has room for behind the longest
    prompt. Raises InputError instead where there is no room at all, the flag was typed, or it is --prefix_len. where:
    whose prompts, for the message."""
    cap, longest = getattr(config, name), max(map(len, prompts))
    room = positions - longest
    if cap > room and (room < 1 or name in config.typed or name == "prefix_len"):
        row = [len(p) for p in prompts].index(longest) + 1
        raise InputError(f"--{name} {cap} and the longest prompt ({where}row {row}, {longest} tokens) exceed the "
                         f"{positions} positions of the model: lower the one or shorten the other")
    if cap > room:
        print(f"--{name} {room}: as much as fits behind the longest prompt ({longest} of {positions} positions)")
        setattr(config, name, room)


def shorten(text: str, lines: int) -> str:
    """The first three quarters of `lines` lines and the last quarter, where there are more; 0 keeps all."""
    found, tail = text.split("\n"), lines // 4
    if not lines or len(found) <= lines + 1:
        return text
    return "\n".join([*found[: lines - tail], f"[... {len(found) - lines} lines ...]", *found[len(found) - tail :]])


if __name__ == "__main__":
    run_command(main, parse_flags(Config, __doc__))
