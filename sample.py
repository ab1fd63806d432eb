"""Sampling with a KV cache, by hand: the first half of an on-policy step, and a command line to talk to a checkpoint.

    python sample.py                                    # teacher and student answer a problem of the embedded test set
    python sample.py --model out/step_000030 --index 7  # another checkpoint, another problem
    python sample.py --prompt $'Zed=Ivy+5\\nDan=Hal-8\\nIvy=31\\nHal=Eve+3\\nEve=14\\nDan?\\n'
    python sample.py --model chains/teacher --prompt - < problem.txt

`generate` decodes in a number of slots, each of which holds one row's keys and values. A row that ends frees its slot;
the next waiting row takes it, or, when none waits, the slots close ranks. So neither training (all rows at once) nor
evaluation (more rows than memory) pays for the rows that are done while the longest is still being written.
"""

import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from data import HERE, InputError, flag, load_jsonl, parse_flags, resolve, run_command
from data.tokenizer import Tokenizer, prompted_as_trained
from model import Decoder, KVCache, Transformer, checkpoint_folder, choose_device, free_memory, head_dim_of

PREFILL_TOKENS = 2**14  # prompts are read in groups of about so many tokens
# Steps between looks at which rows have ended: a look waits for the device, which is free on a CPU. A row that ended in
# between computes on, at a position that nobody reads.
LOOK_EVERY = {"cpu": 1, "cuda": 16}
BLOCK = 256  # tokens of the vocabulary whose probabilities are added up first


@dataclass
class Rollout:
    """B sampled responses. Row i holds its prompt, then its response, then padding (zeros)."""

    tokens: Tensor  # (B, S) int64
    prompt_lens: Tensor  # (B,) int64
    lens: Tensor  # (B,) int64, response tokens, the stop token counted
    finished: Tensor  # (B,) bool: ended with a stop token of its own accord; else it was cut at the cap
    logprobs: Tensor  # (B, max(lens)) float32 log-probability of each response token as it was sampled; 0 where forced
    forced_lens: Tensor  # (B,) int64, tokens at the response's start that were given, not sampled
    # The books, of tokens really handled: prompt tokens read (once, where several samples share a prompt), sampled
    # tokens fed back, and (query, key) pairs attended in both.
    prefilled: int = 0
    decoded: int = 0
    pairs: int = 0
    supervised: Tensor | None = None  # (B, 2) int64, first and last + 1 of the response positions to learn from

    def spans(self) -> Tensor:
        """(B, 2): what is learned from, by default all of each response."""
        return torch.stack((self.lens * 0, self.lens), dim=1) if self.supervised is None else self.supervised

    def num_supervised(self) -> int:
        spans = self.spans()
        return int((spans[:, 1] - spans[:, 0]).sum())

    def response(self, i: int) -> list[int]:
        """Ids of response i, the stop token included where there is one."""
        start = int(self.prompt_lens[i])
        return self.tokens[i, start : start + int(self.lens[i])].tolist()

    def text_ids(self, i: int) -> list[int]:
        """Ids of response i without the stop token: what there is to read."""
        return self.response(i)[:-1] if self.finished[i] else self.response(i)

    def micro_batches(self, rows_at_once: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Parts of the rollout for the training forward: tokens (b, T), mask (b, T-1), position (n,).

        hidden[:, i] predicts tokens[:, i + 1], so the mask marks the n positions that predict a supervised token: of a
        whole response P-1 .. P+len-2, its own stop token included and nothing of the prompt. position counts from the
        response's start. What follows a row's last supervised token is left out. Rows of one length go together, the
        longest first, so that memory peaks at once, and a row goes with none that is more than twice as long: a single
        response that ran to the cap would otherwise make every step several times as dear.
        """
        spans = self.spans()
        ends = self.prompt_lens + spans[:, 1]
        order = ends.argsort(descending=True, stable=True)
        while len(order):
            near = int((2 * ends[order] >= ends[order[0]]).sum())  # rows that are at most half padding beside the first
            rows, order = order[: min(near, rows_at_once)], order[min(near, rows_at_once) :]
            length = int(ends[rows].max())
            at, start = torch.arange(length - 1), self.prompt_lens[rows, None] - 1
            mask = (at >= start + spans[rows, :1]) & (at <= ends[rows, None] - 2)
            yield self.tokens[rows, :length], mask, (at - start)[mask]


@torch.no_grad()
def generate(
    model: Transformer,
    prompts: list[list[int]],
    max_new_tokens: int,
    stop_ids: tuple[int, ...],
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    vocab: int | None = None,
    *,
    min_p: float | None = None,
    num_samples: int = 1,
    forced: list[list[int]] | None = None,
    seeds: list[int] | None = None,
    slots: int | None = None,
    memory_budget: int | None = None,
    progress: bool = False,
    stream: Callable[[int, int], None] | None = None,
    compile: bool = False,
) -> Rollout:
    """Sample `num_samples` responses per prompt, at most `max_new_tokens` long each; a row ends early when it draws one
    of `stop_ids`. Row i * num_samples + k is sample k of prompt i.

    temperature: 0 takes the most likely token. top_k, top_p, min_p (of the largest probability) cut the distribution
        and are for evaluation: the loss of training assumes plain sampling. vocab: the number of real tokens; ids
        beyond it, the padding of the head, are never drawn.
    generator draws one seed per row, unless `seeds` gives them. A row's randomness is a function of its seed and its
        place in the response alone, not of what else is sampled, nor of slots or caps.
    forced: per row, tokens to start the response with (a teacher's prefix). They count as its tokens, but are not cut
        where there are more than max_new_tokens of them.
    slots: rows decoded at once; by default all, or as many as memory_budget (bytes; by default half of what is free)
        holds. When memory runs out all the same, the slots are halved and the unfinished rows start again.
    stream(row, id) is called for every token when it is sampled. compile: torch.compile the decode step, which then
        keeps its shapes, for CUDA graphs.
    Raises ValueError on an empty prompt, max_new_tokens < 1, or lists of the wrong length.
    """
    rows = len(prompts) * num_samples
    if not prompts or not all(prompts):
        raise ValueError("every prompt needs at least one token")
    if max_new_tokens < 1 or num_samples < 1:
        raise ValueError(f"max_new_tokens and num_samples must be at least 1, found {max_new_tokens}, {num_samples}")
    for name, given in (("forced", forced), ("seeds", seeds)):
        if given is not None and len(given) != rows:
            raise ValueError(f"{name} has {len(given)} entries for {rows} rows")
    if seeds is None:
        seeds = torch.randint(2**63 - 1, (rows,), generator=generator).tolist()
    responses = [list(f) for f in forced or [[]] * rows]
    logprobs = [[0.0] * len(r) for r in responses]
    job = Job(
        model=model, stops=torch.tensor(stop_ids, device=model.head.device), vocab=vocab or model.head.shape[0],
        starts=[prompts[i // num_samples] + r for i, r in enumerate(responses)],
        room=[max(0, max_new_tokens - len(r)) for r in responses], seeds=seeds, forced=[len(r) for r in responses],
        cut=(temperature, top_k, top_p, min_p), stream=stream, compile=compile,
    )
    waiting = {i: None for i, r in enumerate(responses) if job.room[i] and not (r and r[-1] in stop_ids)}  # in order
    books = {"prefilled": 0, "decoded": 0, "pairs": 0}
    max_len = max(map(len, prompts)) + max_new_tokens
    slots = min(slots or slots_for(model, max_len, job.vocab, memory_budget), max(1, len(waiting)))
    begin, sampled = time.perf_counter(), 0
    if progress:
        from tqdm import tqdm

        print(f"{len(waiting)} rows in {slots} slots of {max_len} positions: "
              f"{slots * slot_bytes(model, max_len, job.vocab) / 2**20:,.0f} MiB", file=sys.stderr)
        bar = tqdm(total=len(waiting), desc="sample", leave=False)
    while waiting:
        try:
            for i, ids, logp in decode(job, list(waiting), slots, max_len, books):
                responses[i] += ids
                logprobs[i] += logp
                del waiting[i]
                sampled += len(ids)
                if progress:
                    bar.update()
                    bar.set_postfix_str(f"{sampled / (time.perf_counter() - begin):,.0f} tok/s", refresh=False)
        except RuntimeError as error:
            if slots == 1 or not out_of_memory(error):
                raise
            message = str(error).split(".")[0]
        else:
            break
        slots = (slots + 1) // 2  # here, where the exception holds no tensors any more
        print(f"out of memory ({message}): {len(waiting)} rows go on in {slots} slots", file=sys.stderr)
    if progress:
        bar.close()

    lens = torch.tensor([len(r) for r in responses])
    prompt_lens = torch.tensor([len(p) for p in prompts]).repeat_interleave(num_samples)
    tokens = torch.zeros(rows, int((prompt_lens + lens).max()), dtype=torch.long)
    logp = torch.zeros(rows, int(lens.max()))
    for i, r in enumerate(responses):
        sequence = prompts[i // num_samples] + r
        tokens[i, : len(sequence)] = torch.tensor(sequence)
        logp[i, : len(r)] = torch.tensor(logprobs[i])
    finished = torch.tensor([r[-1] in stop_ids for r in responses])
    return Rollout(tokens, prompt_lens, lens, finished, logp, torch.tensor(job.forced), **books)


def out_of_memory(error: RuntimeError) -> bool:
    """torch.OutOfMemoryError is a RuntimeError; the CPU's allocator has none of its own."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


@dataclass
class Job:
    """What stays the same while some rows are decoded."""

    model: Transformer
    stops: Tensor
    vocab: int
    starts: list[list[int]]  # per row: what is read before the first token is sampled
    room: list[int]  # per row: how many tokens may be sampled
    seeds: list[int]
    forced: list[int]  # per row: tokens of the response that are in starts
    cut: tuple  # temperature, top_k, top_p, min_p
    stream: Callable[[int, int], None] | None
    compile: bool


def decode(job: Job, rows: list[int], slots: int, max_len: int, books: dict) -> Iterator[tuple[int, list, list]]:
    """Sample the given rows, `slots` at a time. Yields (row, sampled ids, their log-probabilities) as each row ends.

    Every row of the cache holds its own prompt and response without a gap, at its own length, and sees only positions
    up to its own last one: what an earlier user of the slot, or the padding of a prefill, has left beyond is
    overwritten before it can be seen. So a row's neighbours cannot change it.
    """
    model, device, head = job.model, job.model.head.device, job.model.head[: job.vocab]
    forward, read, to_logits = model, model, lambda hidden: hidden @ head.T
    if device.type == "cpu" and head.dtype.itemsize >= 4 and not job.compile and room_for_a_copy(model):
        forward = read = Decoder(model, slots, job.vocab)
        to_logits = forward.logits
    if job.compile:  # one graph for a length of the cache and an extent: so that there are few, both are rounded up
        max_len = math.ceil(max_len / 256) * 256
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        forward = torch.compile(model, mode="reduce-overhead", dynamic=False)
    look_every = 1 if job.stream is not None else LOOK_EVERY.get(device.type, 16)
    width = max(job.room[i] for i in rows)
    cache = KVCache(model.config, slots, max_len, device, head.dtype)
    if job.compile:
        torch._dynamo.mark_static_address(cache.kv)
    hidden = torch.zeros(slots, head.shape[1], device=device, dtype=head.dtype)  # of each slot's last token
    ids = torch.zeros(slots, width, dtype=torch.long, device=device)
    logp = torch.zeros(slots, width, device=device)
    noise = torch.zeros(slots, width, dtype=torch.float64, device=device)
    length, count, room = torch.zeros(3, slots, dtype=torch.long, device=device)  # of the start; sampled; at most
    active = torch.zeros(slots, dtype=torch.bool, device=device)
    row_of: list[int | None] = [None] * slots
    birth = [0] * slots  # step at which the slot's row would have had length 0
    queue, step = deque(rows), 0

    def admit(free: list[int]) -> None:
        """Give free slots to waiting rows and read their prompts, each distinct one once."""
        taken = {}  # start -> its slots
        for s in free[: len(queue)]:
            row_of[s] = i = queue.popleft()
            start = job.starts[i]
            taken.setdefault(tuple(start), []).append(s)
            birth[s] = step - len(start)
            length[s], count[s], room[s], active[s] = len(start), 0, job.room[i], True
            drawn = torch.rand(job.forced[i] + job.room[i], generator=torch.Generator().manual_seed(job.seeds[i]),
                               dtype=torch.float64)  # fmt: skip
            noise[s, : job.room[i]] = drawn[job.forced[i] :].to(device)
        starts = sorted(taken, key=len, reverse=True)
        while starts:
            longest = len(starts[0])
            near = sum(4 * len(start) >= 3 * longest for start in starts)  # padding is dearer than another reading
            size = max(1, min(near, PREFILL_TOKENS // longest))
            part, starts = starts[:size], starts[size:]
            tokens = torch.zeros(len(part), longest, dtype=torch.long)
            for k, start in enumerate(part):
                tokens[k, : len(start)] = torch.tensor(start)
            own = KVCache(model.config, len(part), longest, device, head.dtype)
            last = torch.tensor([len(start) - 1 for start in part], device=device)
            last = read(tokens.to(device), cache=own)[torch.arange(len(part), device=device), last]  # (b, H)
            to = torch.tensor([s for start in part for s in taken[start]], device=device)
            source = torch.tensor([k for k, start in enumerate(part) for _ in taken[start]], device=device)
            cache.copy_rows(to, own, source, longest)
            hidden[to] = last[source]
            books["prefilled"] += sum(map(len, part))
            books["pairs"] += sum(len(start) * (len(start) + 1) // 2 for start in part)

    admit(list(range(slots)))
    while True:
        logits = to_logits(hidden)
        drawn, drawn_logp = draw(logits, noise.gather(1, count.clamp(max=width - 1)[:, None])[:, 0], *job.cut)
        at = count.clamp(max=width - 1)[:, None]
        ids.scatter_(1, at, torch.where(active[:, None], drawn[:, None], ids.gather(1, at)))
        logp.scatter_(1, at, torch.where(active[:, None], drawn_logp[:, None].float(), logp.gather(1, at)))
        count += active
        active &= ~torch.isin(drawn, job.stops) & (count < room)
        step += 1

        free = []
        if step % look_every == 0:
            if job.stream is not None:
                for s, i in enumerate(row_of):
                    if i is not None:
                        job.stream(i, int(drawn[s]))
            going, counts = active.tolist(), count.tolist()
            for s, i in enumerate(row_of):
                if i is not None and not going[s]:
                    n, start = counts[s], len(job.starts[i])
                    books["decoded"] += n - 1  # the last is never fed back
                    books["pairs"] += (n - 1) * start + n * (n - 1) // 2  # the j-th fed back sees start + j
                    row_of[s] = None
                    yield i, ids[s, :n].tolist(), logp[s, :n].tolist()
            free = [s for s, i in enumerate(row_of) if i is None]
            if len(free) == len(row_of) and not queue:
                return
            # Nobody waits: let the last rows move up into the gaps. Not for every gap, since a move costs a copy.
            if not queue and not job.compile and len(free) >= max(1, len(row_of) // 8):
                left = len(row_of) - len(free)
                gaps, movers = [s for s in free if s < left], [s for s in range(left, len(row_of)) if s not in free]
                if movers:
                    to, source = torch.tensor(gaps, device=device), torch.tensor(movers, device=device)
                    cache.copy_rows(to, cache, source, step - min(birth[s] for s in movers))
                    for x in (ids, logp, noise, length, count, room, active, drawn):
                        x[to] = x[source]
                    for s, m in zip(gaps, movers):
                        row_of[s], birth[s] = row_of[m], birth[m]
                cache = cache.first(left)
                ids, logp, noise, length, count, room, active, drawn = (
                    x[:left] for x in (ids, logp, noise, length, count, room, active, drawn)
                )
                row_of, birth, free = row_of[:left], birth[:left], []

        # Feed the drawn tokens back. No position is beyond the longest occupied one, so the rest need not be read.
        extent = step - min((birth[s] for s, i in enumerate(row_of) if i is not None), default=step - 1)
        if job.compile:
            extent = max(128, 2 ** math.ceil(math.log2(max(extent, 1))))
        place = (length + count - 1).clamp(min=0)
        hidden = forward(drawn[:, None], place[:, None], cache, slots=min(extent, max_len))[:, 0]
        if job.compile:
            hidden = hidden.clone()  # a CUDA graph reuses its output's memory
        if queue and len(free) >= max(1, len(row_of) // 16):  # reading one costs as much as four
            admit(free)


def room_for_a_copy(model: Transformer) -> bool:
    """Whether a Decoder takes a quarter of the free memory at most; half of it may go to the slots. Without one
    the last digits are others."""
    return 4 * sum(p.nbytes for p in model.parameters()) <= free_memory(model.head.device)


def slot_bytes(model: Transformer, max_len: int, vocab: int) -> int:
    """Memory of one slot: keys and values, and its row of logits with what drawing makes of it."""
    config, itemsize = model.config, model.head.dtype.itemsize
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim_of(config) * max_len * itemsize
    return cache + vocab * (itemsize + 3 * max(4, itemsize))


def slots_for(model: Transformer, max_len: int, vocab: int, memory_budget: int | None) -> int:
    if memory_budget is None:
        memory_budget = free_memory(model.head.device) // 2
    return max(1, memory_budget // slot_bytes(model, max_len, vocab))


def draw(
    logits: Tensor,
    uniform: Tensor,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> tuple[Tensor, Tensor]:
    """One token per row of logits (B, V) by inverting the cumulative distribution at uniform (B,): ids (B,), logprobs
    (B,)."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if temperature == 0:
        top, token = logits.max(-1)
        return token, -(logits - top[:, None]).exp_().sum(-1).log()
    x = logits - logits.amax(-1, keepdim=True)
    if temperature != 1:
        x /= temperature
    if top_k is not None and top_k < x.shape[-1]:
        x.masked_fill_(x < x.topk(top_k, dim=-1).values[:, -1:], -math.inf)
    if min_p:
        x.masked_fill_(x < math.log(min_p), -math.inf)
    if top_p is not None and top_p < 1:
        ordered, order = x.softmax(-1).sort(-1, descending=True)
        beyond = ordered.cumsum(-1) - ordered >= top_p  # the mass before this token is enough already
        x.masked_fill_(torch.zeros_like(beyond).scatter_(-1, order, beyond), -math.inf)
    p = x.exp_()  # not normalised

    # Over 150,000 tokens a cumulative sum in float32 would lose the rare ones, and one in float64 takes longer than the
    # model's head. So first the block of the vocabulary is found, then the token in it.
    V, even = p.shape[-1], p.shape[-1] // BLOCK * BLOCK
    sums = torch.cat((p[:, :even].unflatten(-1, (even // BLOCK, BLOCK)).sum(-1), p[:, even:].sum(-1, keepdim=True)), -1)
    cumulative = F.pad(sums.double().cumsum(-1), (1, 0))  # (B, blocks + 1)
    target = uniform[:, None] * cumulative[:, -1:]
    block = first_above(cumulative[:, 1:], target)  # (B, 1)
    at = block * BLOCK + torch.arange(BLOCK, device=p.device)
    inside = p.gather(-1, at.clamp(max=V - 1)).double().masked_fill_(at >= V, 0).cumsum(-1)  # (B, BLOCK)
    share = (target - cumulative.gather(-1, block)) / sums.gather(-1, block)  # where in the block, 0 to 1
    token = block * BLOCK + first_above(inside, share.clamp_(min=0) * inside[:, -1:])
    token.clamp_(max=V - 1)  # likewise; the loss of the step will say so
    return token[:, 0], (p.gather(-1, token).log() - cumulative[:, -1:].log())[:, 0]


def first_above(cumulative: Tensor, target: Tensor) -> Tensor:
    """Index (B, 1) of the first entry of cumulative (B, n) above target (B, 1). Rounding may have lifted the target to
    the last entry; it is kept below, so that no token of probability 0 is ever drawn."""
    below = torch.minimum(target, cumulative[:, -1:] * (1 - 1e-15))
    found = torch.searchsorted(cumulative.contiguous(), below, right=True)
    return found.clamp_(max=cumulative.shape[-1] - 1)  # beyond only where the logits were not finite


@dataclass
class Config:
    model: str = flag("", "checkpoint folder or hub name; empty shows the embedded teacher and student side by side")
    prompt: str = flag("", "your own prompt, or - to read it from standard input; empty takes a problem of --data")
    data: str = flag("chains", "data set the problem comes from: a name or a .jsonl file")
    index: int = flag(0, "which problem of the test set")
    chat: str = flag("auto", "auto: through the chat template where there is one; on: demand it; off: the bare prompt")
    system: str = flag("", "text of a system turn before the prompt, for checkpoints with a chat template")
    thinking: str = flag("", "on or off, for chat templates that have the switch")
    stop_tokens: str = flag("", "stop tokens besides those the checkpoint declares, comma-separated names or ids")
    max_new_tokens: int = flag(512, "cap on the response")
    temperature: float = flag(0.0, "0 takes the most likely token, 1 samples from the model's own distribution")
    top_k: int = flag(0, "sample among the k most likely tokens only; 0 is off")
    top_p: float = flag(1.0, "sample among the most likely tokens that hold this much probability; 1 is off")
    min_p: float = flag(0.0, "sample among tokens of at least this share of the largest probability; 0 is off")
    num_samples: int = flag(1, "responses per model; at --temperature 0 they are all the same")
    seed: int = flag(1337, "seed of the sampling")
    device: str = flag("", "cpu, cuda, ...; empty chooses")
    compile: bool = flag(False, "torch.compile the decode step: minutes of warm-up, for long responses on a GPU")


def check_sampling(config) -> None:
    """Refuse unusable flags of sample.py and eval.py."""
    for name in ("max_new_tokens", "num_samples"):
        if getattr(config, name) < 1:
            raise InputError(f"--{name} must be at least 1, found {getattr(config, name)}")
    if not 0 <= config.temperature < math.inf:
        raise InputError(f"--temperature must not be negative, found {config.temperature}")
    if config.top_k < 0:
        raise InputError(f"--top_k must not be negative, found {config.top_k}")
    if not 0 < config.top_p <= 1:
        raise InputError(f"--top_p must lie above 0 and at most at 1, found {config.top_p}")
    if not 0 <= config.min_p <= 1:
        raise InputError(f"--min_p must lie between 0 and 1, found {config.min_p}")


def main(config: Config) -> None:
    check_sampling(config)
    answer = None
    if config.prompt:
        prompt = sys.stdin.read() if config.prompt == "-" else config.prompt
    else:
        rows = load_jsonl(resolve(config.data, "test"), need=("prompt",))
        if not 0 <= config.index < len(rows):
            raise InputError(f"--index {config.index}: the data has rows 0 to {len(rows) - 1}")
        prompt, answer = rows[config.index]["prompt"], rows[config.index].get("answer")
    pair = config.data if (HERE / config.data / "teacher").is_dir() else "chains"
    paths = [config.model] if config.model else [f"{pair}/teacher", f"{pair}/student"]
    device, folders = choose_device(config.device), {path: checkpoint_folder(path) for path in paths}
    print(prompt.rstrip("\n") + (f"\n(the answer is {answer})" if answer is not None else ""))
    for path, folder in folders.items():
        prompted_as_trained(config, folder)
        tokenizer = Tokenizer(folder, config.chat, config.system, config.thinking)
        ids = tokenizer.encode_prompt(prompt)
        if config.prompt and not prompt.endswith("\n") and not tokenizer.chats():
            print("note: the prompt does not end with a newline; the embedded models expect one")
        if not ids:
            raise InputError("--prompt: nothing in it, and this tokenizer puts nothing before it")
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        model = Transformer.from_pretrained(folder, device, dtype)
        if len(ids) + config.max_new_tokens > model.config.max_position_embeddings:
            raise InputError(f"--max_new_tokens {config.max_new_tokens} and the prompt's {len(ids)} exceed the "
                             f"{model.config.max_position_embeddings} positions of {path}")  # fmt: skip
        stop_ids = (*tokenizer.stop_ids, *tokenizer.stop_ids_of(config.stop_tokens))
        name = f"{folder.parent.name}/{folder.name}"
        shown, sampled = "", []

        def show(_, i: int) -> None:
            """Print what the new token adds to the text; half a character waits for its other half."""
            nonlocal shown
            if i not in stop_ids:  # noqa: B023 (called before the next round)
                sampled.append(i)  # noqa: B023
            text = tokenizer.decode(sampled)  # noqa: B023
            if not text.endswith("\ufffd"):
                print(text[len(shown) :], end="", flush=True)
                shown = text

        alone = config.num_samples == 1
        if alone:
            print(f"\n--- {name}")
        start = time.perf_counter()
        rollout = generate(
            model, [ids], config.max_new_tokens, stop_ids, config.temperature, config.top_k or None, config.top_p,
            torch.Generator().manual_seed(config.seed), tokenizer.vocab_size, min_p=config.min_p,
            num_samples=config.num_samples, progress=not alone, stream=show if alone else None, compile=config.compile,
        )
        seconds = time.perf_counter() - start
        for i in range(config.num_samples):
            if not alone:
                print(f"\n--- {name}, sample {i}")
                print(tokenizer.decode(rollout.text_ids(i)), end="")
            how = "stopped by itself" if rollout.finished[i] else "cut at the cap"
            print(f"\n[{int(rollout.lens[i])} tokens, {how}]")
        total = int(rollout.lens.sum())
        print(f"[{rollout.prefilled} prompt, {total} response tokens; {seconds:.2f} s, {total / seconds:,.0f} tok/s"
              + (", compiling included]" if config.compile else "]"))  # fmt: skip


if __name__ == "__main__":
    run_command(main, parse_flags(Config, __doc__))
