"""Sampling with a KV cache, by hand: the first half of an on-policy step, and a command line to talk to a checkpoint.

    python sample.py                                    # teacher and student answer a problem of the embedded test set
    python sample.py --model out/step_000030 --index 7  # another checkpoint, another problem
    python sample.py --prompt $'Dan=Hal-8\\nHal=5\\nDan?\\n'
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from data import InputError, flag, load_jsonl, parse_flags, resolve, run_command
from data.tokenizer import Tokenizer
from model import KVCache, Transformer, checkpoint_folder, choose_device

LOOK_EVERY = 16  # steps between looks at which rows are done: each look waits for the device


@dataclass
class Rollout:
    """B sampled responses. Row i holds its prompt, then its response, then padding (zeros)."""

    tokens: Tensor  # (B, S) int64
    prompt_lens: Tensor  # (B,) int64
    lens: Tensor  # (B,) int64, response tokens, the stop token counted
    finished: Tensor  # (B,) bool: ended with a stop token of its own accord; else it was cut at the cap
    logprobs: Tensor  # (B, max(lens)) float32 log-probability of each response token as it was sampled
    pairs: int  # (query, key) pairs attended, prefill and decoding, for the FLOP count

    def response(self, i: int) -> list[int]:
        """Ids of response i, the stop token included where there is one."""
        start = int(self.prompt_lens[i])
        return self.tokens[i, start : start + int(self.lens[i])].tolist()

    def text_ids(self, i: int) -> list[int]:
        """Ids of response i without the stop token: what there is to read."""
        return self.response(i)[:-1] if self.finished[i] else self.response(i)

    def micro_batches(self, rows_at_once: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Parts of the rollout for the training forward: tokens (b, T), mask (b, T-1), position (n,).

        hidden[:, i] predicts tokens[:, i + 1], so the mask marks the n positions that predict a response token: P-1 ..
        P+len-2 of each row, its own stop token included and nothing of the prompt. position counts from the response's
        start. Rows of one length go together, the longest first, so that little is padded and memory peaks at once.
        """
        total_lens = self.prompt_lens + self.lens
        for rows in total_lens.argsort(descending=True).split(rows_at_once):
            length = int(total_lens[rows].max())
            at = torch.arange(length - 1)
            first, last = self.prompt_lens[rows, None] - 1, total_lens[rows, None] - 2
            mask = (at >= first) & (at <= last)
            yield self.tokens[rows, :length], mask, (at - first)[mask]


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
) -> Rollout:
    """Sample one response per prompt, at most `max_new_tokens` long; a row ends early when it draws one of `stop_ids`.

    Prompts may differ in length: each row writes keys and values at its own positions and sees only those below, so a
    row's neighbours cannot change it. temperature 0 takes the most likely token. top_k and top_p cut the distribution
    and are for evaluation: the loss of training assumes plain sampling. `vocab` is the number of real tokens; ids
    beyond it, the padding of the head, are never drawn.

    All uniform numbers are drawn from `generator` (on the CPU) before the first step, one per row and token. So a row's
    randomness depends on its place in `prompts`, not on when other rows end.

    Raises ValueError on an empty prompt or max_new_tokens < 1.
    """
    if not prompts or not all(prompts):
        raise ValueError("every prompt needs at least one token")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, found {max_new_tokens}")
    device, B = model.head.device, len(prompts)
    head = model.head[:vocab]  # (V, H)
    lens = torch.tensor([len(p) for p in prompts])
    longest = int(lens.max())
    uniforms = torch.rand(B, max_new_tokens, generator=generator, dtype=torch.float64).to(device)
    stops = torch.tensor(stop_ids, device=device)

    # What is returned, on the device, a row per prompt.
    tokens = torch.zeros(B, longest + max_new_tokens, dtype=torch.long, device=device)
    for i, prompt in enumerate(prompts):
        tokens[i, : len(prompt)] = torch.tensor(prompt)
    logprobs = torch.zeros(B, max_new_tokens, device=device)
    new_lens = torch.zeros(B, dtype=torch.long, device=device)

    # Prefill: all prompts at once, padded on the right. What padding leaves in the cache lies at positions that the
    # row's own response overwrites before it can see them.
    cache = KVCache(model.config, B, longest + max_new_tokens, device, head.dtype)
    hidden = model(tokens[:, :longest], cache=cache)
    position = lens.to(device) - 1  # (b,) of the last token each active row has
    hidden = hidden[torch.arange(B, device=device), position]  # (b, H)
    pairs = int((lens * (lens + 1) // 2).sum())

    # `rows` are the rows still in the batch; `active` those of them that have not ended.
    rows = torch.arange(B, device=device)
    active = torch.ones(B, dtype=torch.bool, device=device)
    for step in range(max_new_tokens):
        drawn, logprob = draw((hidden @ head.T).float(), uniforms[rows, step], temperature, top_k, top_p)
        position = position + active
        tokens[rows, position] = torch.where(active, drawn, tokens[rows, position])
        logprobs[rows, step] = torch.where(active, logprob, 0.0)
        new_lens[rows] += active
        active = active & ~torch.isin(drawn, stops)
        if step + 1 == max_new_tokens:
            break
        if (step + 1) % LOOK_EVERY == 0:
            left = int(active.sum())
            if left == 0:
                break
            if left <= 0.75 * len(rows):  # enough rows are done to be worth copying the others together
                rows, position, drawn = rows[active], position[active], drawn[active]
                cache.keep(active.nonzero()[:, 0])
                active = active[active]
        # A row that has ended computes on until the next look, at a position nobody reads.
        hidden = model(drawn[:, None], positions=position[:, None], cache=cache, slots=longest + step + 1)[:, 0]

    new_lens = new_lens.cpu()
    ends = torch.isin(tokens[torch.arange(B), lens.to(device) + new_lens.to(device) - 1], stops).cpu()
    new_pairs = (new_lens - 1) * lens + new_lens * (new_lens - 1) // 2  # the j-th of n - 1 tokens fed back sees P + j
    return Rollout(
        tokens[:, : int((lens + new_lens).max())].cpu(), lens, new_lens, ends, logprobs[:, : int(new_lens.max())].cpu(),
        pairs + int(new_pairs.sum()),
    )


def draw(
    logits: Tensor, uniform: Tensor, temperature: float, top_k: int | None = None, top_p: float | None = None
) -> tuple[Tensor, Tensor]:
    """One token per row of logits (B, V) by inverting the cumulative distribution at uniform (B,): ids (B,), logprobs
    (B,)."""
    if temperature == 0:
        log_p = logits.log_softmax(-1)
        token = logits.argmax(-1)
        return token, log_p.gather(-1, token[:, None])[:, 0]
    logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        kth = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    if top_p is not None and top_p < 1:
        ordered, order = logits.softmax(-1).sort(-1, descending=True)
        beyond = ordered.cumsum(-1) - ordered >= top_p  # the mass before this token is enough already
        logits = logits.masked_fill(beyond.scatter(-1, order, beyond), -math.inf)
    log_p = logits.log_softmax(-1)
    cumulative = log_p.double().exp().cumsum(-1)  # float64: over 150,000 tokens float32 would lose the rare ones
    target = uniform[:, None] * cumulative[:, -1:]
    token = torch.searchsorted(cumulative, target, right=True).clamp(max=logits.shape[-1] - 1)
    return token[:, 0], log_p.gather(-1, token)[:, 0]


@dataclass
class Config:
    model: str = flag("", "checkpoint folder or hub name; empty shows the embedded teacher and student side by side")
    prompt: str = flag("", "your own prompt; empty takes a problem of --data")
    data: str = flag("chains", "data set the problem comes from: a name or a .jsonl file")
    index: int = flag(0, "which problem of the test set")
    chat: str = flag("auto", "auto: through the chat template where there is one; on: demand it; off: the bare prompt")
    system: str = flag("", "text of a system turn before the prompt, for checkpoints with a chat template")
    thinking: str = flag("", "on or off, for chat templates that have the switch")
    max_new_tokens: int = flag(512, "cap on the response")
    temperature: float = flag(0.0, "0 takes the most likely token, 1 samples from the model's own distribution")
    top_k: int = flag(0, "sample among the k most likely tokens only; 0 is off")
    top_p: float = flag(1.0, "sample among the most likely tokens that hold this much probability; 1 is off")
    num_samples: int = flag(1, "responses per model")
    seed: int = flag(1337, "seed of the sampling")
    device: str = flag("", "cpu, cuda, ...; empty chooses")


def main(config: Config) -> None:
    answer = None
    if config.prompt:
        prompt = config.prompt
    else:
        rows = load_jsonl(resolve(config.data, "test"))
        if not 0 <= config.index < len(rows):
            raise InputError(f"--index {config.index}: the data has rows 0 to {len(rows) - 1}")
        prompt, answer = rows[config.index]["prompt"], rows[config.index]["answer"]
    print(prompt.rstrip("\n") + (f"\n(the answer is {answer})" if answer is not None else ""))
    device = choose_device(config.device)
    for path in [config.model] if config.model else ["chains/teacher", "chains/student"]:
        folder = checkpoint_folder(path)
        tokenizer = Tokenizer(folder, config.chat, config.system, config.thinking)
        model = Transformer.from_pretrained(folder, device)
        rollout = generate(
            model, [tokenizer.encode_prompt(prompt)] * config.num_samples, config.max_new_tokens, tokenizer.stop_ids,
            config.temperature, config.top_k or None, config.top_p, torch.Generator().manual_seed(config.seed),
            tokenizer.vocab_size,
        )
        for i in range(config.num_samples):
            how = "stopped by itself" if rollout.finished[i] else "cut at the cap"
            print(f"\n--- {folder.parent.name}/{folder.name}: {int(rollout.lens[i])} tokens, {how}")
            print(tokenizer.decode(rollout.text_ids(i)))


if __name__ == "__main__":
    run_command(main, parse_flags(Config, __doc__))
