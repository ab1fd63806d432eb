"""Accuracy of a checkpoint on problems with a verifiable answer, with the numbers that keep accuracy honest.

    python eval.py --model chains/student --data chains
    python eval.py --model out/step_000030 --data chains --temperature 1 --num_samples 4

A response is right when its stated answer equals the reference (data/answers.py). Since a model trained on prefixes may
stop ending its responses, accuracy is reported together with P(finish), the share of responses that end by themselves
below the cap, and accuracy among those.
"""

import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from data import InputError, flag, load_jsonl, parse_flags, resolve, run_command
from data.answers import extract_answer, is_correct
from data.tokenizer import Tokenizer
from loss import distill_loss
from model import Transformer, checkpoint_folder, choose_device
from sample import check_sampling, generate


def wilson(hits: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """95% interval of a share of n independent trials (Wilson's score interval), which behaves near 0 and 1."""
    share, z2 = hits / n, z * z
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = z / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def evaluate(
    model: Transformer,
    tokenizer: Tokenizer,
    rows: list[dict],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    num_samples: int = 1,
    batch_size: int = 128,
    seed: int = 1337,
    vocab: int | None = None,
    stop_ids: tuple[int, ...] | None = None,
    progress: bool = False,
) -> tuple[dict, list[dict]]:
    """Answer every row's prompt `num_samples` times and grade: (summary, one record per response, in the order of
    rows).

    Summary, all floats: accuracy (mean over problems of the share of right samples), low and high (Wilson 95% over
    problems), finish (share of responses ended by themselves), accuracy_given_finish (nan if none ended), no_answer,
    capped, mean_len (tokens), seconds.
    Draws from its own generator, so that evaluating inside a training run does not disturb the run.
    """
    encoded = [tokenizer.encode_prompt(row["prompt"]) for row in rows]
    order = sorted(range(len(rows)), key=lambda i: -len(encoded[i]))  # neighbours of one length are read together
    start = time.perf_counter()
    rollout = generate(
        model, [encoded[i] for i in order], max_new_tokens, stop_ids or tokenizer.stop_ids, temperature, top_k, top_p,
        torch.Generator().manual_seed(seed), vocab or tokenizer.vocab_size, min_p=min_p, num_samples=num_samples,
        slots=batch_size, progress=progress,
    )
    records: list[dict] = []
    for k in range(len(rows) * num_samples):
        row, text = rows[order[k // num_samples]], tokenizer.decode(rollout.text_ids(k))
        records.append({
            "problem": order[k // num_samples], "prompt": row["prompt"], "answer": row["answer"], "response": text,
            "extracted": extract_answer(text), "correct": is_correct(text, row["answer"]),
            "finished": bool(rollout.finished[k]), "tokens": int(rollout.lens[k]),
        })
    records.sort(key=lambda r: r["problem"])
    n, right = len(records), sum(r["correct"] for r in records)
    ended = [r for r in records if r["finished"]]
    low, high = wilson(right / num_samples, len(rows))
    return {
        "accuracy": right / n, "low": low, "high": high, "finish": len(ended) / n,
        "accuracy_given_finish": sum(r["correct"] for r in ended) / len(ended) if ended else math.nan,
        "no_answer": sum(r["extracted"] is None for r in records) / n, "capped": 1 - len(ended) / n,
        "mean_len": sum(r["tokens"] for r in records) / n, "seconds": time.perf_counter() - start,
    }, records


def by_position(values: Tensor, position: Tensor) -> dict[str, float]:
    """Mean over the positions 0, 1, 2-3, 4-7, 8-15, ... of the response."""
    bucket = torch.log2(position.double().clamp(min=0.5)).floor().long() + 1  # 0 -> 0, 1 -> 1, 2-3 -> 2, ...
    sums = torch.zeros(int(bucket.max()) + 1, dtype=torch.double).index_add_(0, bucket, values.double())
    counts = torch.bincount(bucket)
    return {str(0 if b == 0 else 2 ** (b - 1)): (sums[b] / counts[b]).item() for b in range(len(counts)) if counts[b]}


@torch.no_grad()
def measure_kl(
    student: Transformer,
    teacher: Transformer,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    stop_ids: tuple[int, ...],
    vocab: int,
    temperature: float = 1.0,
    stop_class: bool = True,
    micro_batch: int = 16,
    batch_size: int = 128,
    seed: int = 1337,
) -> dict:
    """Reverse KL from student to teacher, in nats per token, over responses the student samples to the prompts.

    Whole responses (up to max_new_tokens), whatever prefix was trained, so that `kl_by_position` shows what happens to
    the tail. Draws from its own generator. Returns kl, kl_by_position, response_len, finish, seconds.
    """
    start = time.perf_counter()
    rollout = generate(
        student, prompts, max_new_tokens, stop_ids, temperature, generator=torch.Generator().manual_seed(seed),
        vocab=vocab, slots=batch_size,
    )
    kl, where = [], []
    for tokens, mask, position in rollout.micro_batches(micro_batch):
        tokens, mask = tokens.to(student.head.device), mask.to(student.head.device)
        hidden_s, hidden_t = student(tokens[:, :-1])[mask], teacher(tokens[:, :-1])[mask]
        _, stats = distill_loss(
            hidden_s, student.head, hidden_t, teacher.head, temperature=temperature, vocab=vocab,
            stop_ids=stop_ids if stop_class else (),
        )
        kl.append(stats["kl"].cpu())
        where.append(position)
    return {
        "kl": torch.cat(kl).double().mean().item(), "kl_by_position": by_position(torch.cat(kl), torch.cat(where)),
        "response_len": rollout.lens.double().mean().item(), "finish": rollout.finished.double().mean().item(),
        "seconds": time.perf_counter() - start,
    }


@torch.no_grad()
def preflight(
    student: Transformer,
    teacher: Transformer,
    tokenizer: Tokenizer,
    teacher_tokenizer: Tokenizer,
    prompts: list[str],
    *,
    stop_ids: tuple[int, ...],
    vocab: int,
    stop_class: bool,
    max_new_tokens: int,
    seed: int,
) -> tuple[list[str], list[str]]:
    """Look at a pair before it is trained: (lines to print, warnings), in plain language.

    A few prompts are answered by the student, and both models are asked two questions that betray most mismatches: what
    should come first, and how likely is each stop token where the student stopped?
    """
    lines, warnings = [], []

    def spell(i: int) -> str:
        return f"{i} {tokenizer.decode([i])!r}"

    encoded = [tokenizer.encode_prompt(p) for p in prompts]
    lines.append(f"prompt as both models see it: {tokenizer.decode(encoded[0])!r}")
    theirs = teacher_tokenizer.encode_prompt(prompts[0])
    if theirs != encoded[0]:
        warnings.append(
            "template mismatch: the teacher's own chat template would render this prompt as "
            f"{teacher_tokenizer.decode(theirs)!r}. A teacher scores badly what it was not trained to read; "
            "compare --chat on and --chat off, or give the student the teacher's template"
        )

    rollout = generate(
        student, encoded, max_new_tokens, stop_ids, generator=torch.Generator().manual_seed(seed), vocab=vocab
    )
    first, last, ended = [], [], []  # (2, vocab) log-probabilities of student and teacher at a response's two ends
    for i, prompt in enumerate(encoded):
        row = torch.tensor([prompt + rollout.response(i)[:-1]], device=student.head.device)
        log_p = torch.stack(
            [
                (m(row)[0, [len(prompt) - 1, -1]].float() @ m.head[:vocab].float().T).log_softmax(-1).cpu()
                for m in (student, teacher)
            ]
        )  # (2 models, 2 places, vocab)
        first.append(log_p[:, 0])
        if rollout.finished[i]:
            last.append(log_p[:, 1])
            ended.append(rollout.response(i)[-1])
    p, q = torch.stack(first).exp().mean(0)  # (vocab,) each, over the prompts
    kl = torch.stack([(x[0].exp() * (x[0] - x[1])).sum() for x in first]).mean()
    lines.append(
        f"first token: KL {kl:.2f} nats; most likely {spell(int(p.argmax()))} to the student ({p.max():.2f}), "
        f"{spell(int(q.argmax()))} to the teacher ({q.max():.2f})"
    )
    for writer, reader, a, b in (("teacher", "student", q, p), ("student", "teacher", p, q)):
        opener = int(a.argmax())
        text = tokenizer.decode([opener])
        if text in tokenizer.special and opener not in stop_ids and a[opener] > 0.5 and b[opener] < 0.1:
            if "think" in text:
                warnings.append(
                    f"thinking-mode mismatch: the {writer} opens with {text!r} ({a[opener]:.2f}), the {reader} does "
                    f"not ({b[opener]:.1e}). Choose --thinking off, or a pair of one mode"
                )
            else:
                warnings.append(
                    f"template mismatch: the {writer} expects {text!r} next ({a[opener]:.2f}), the {reader} does "
                    f"not ({b[opener]:.1e}), so the prompt probably lacks a part of the {writer}'s template. See --chat"
                )
    if not ended:
        lines.append(f"stops: none of {len(prompts)} rollouts ended within {max_new_tokens} tokens")
        return lines, warnings
    p, q = torch.stack(last).exp().mean(0)
    lines.append(
        f"stops: {len(ended)} of {len(prompts)} rollouts ended within {max_new_tokens} tokens; there, on average, "
        + ", ".join(f"{spell(i)}: student {p[i]:.1e}, teacher {q[i]:.1e}" for i in stop_ids)
    )
    used = max(set(ended), key=ended.count)
    preferred = max(stop_ids, key=lambda i: q[i])
    if preferred != used and q[preferred] > 100 * q[used]:
        effect = (
            "They are one class in the loss, so this costs nothing" if stop_class else
            "Every stop will be punished and responses will run to the cap: leave --stop_class on"
        )
        warnings.append(
            f"stop mismatch: the student ends with {spell(used)}, the teacher with {spell(preferred)}. {effect}"
        )
    return lines, warnings


@dataclass
class Config:
    model: str = flag("chains/student", "checkpoint folder or hub name")
    data: str = flag("chains", "data set: a name (its test split) or a .jsonl file with prompt and answer")
    num_problems: int = flag(0, "evaluate the first this many problems; 0 takes all")
    num_samples: int = flag(1, "responses per problem; accuracy is their mean (avg@k)")
    temperature: float = flag(0.0, "0 takes the most likely token, 1 samples from the model's own distribution")
    top_k: int = flag(0, "sample among the k most likely tokens only; 0 is off")
    top_p: float = flag(1.0, "sample among the most likely tokens that hold this much probability; 1 is off")
    min_p: float = flag(0.0, "sample among tokens of at least this share of the largest probability; 0 is off")
    stop_tokens: str = flag("", "stop tokens besides those the checkpoint declares, comma-separated names or ids")
    chat: str = flag("auto", "auto: through the chat template where there is one; on: demand it; off: the bare prompt")
    system: str = flag("", "text of a system turn before the prompt, for checkpoints with a chat template")
    thinking: str = flag("", "on or off, for chat templates that have the switch")
    max_new_tokens: int = flag(512, "cap on the response")
    batch_size: int = flag(128, "responses sampled together; lower it if memory runs out")
    seed: int = flag(1337, "seed of the sampling")
    out: str = flag("", "write summary and every response to this .json file")
    device: str = flag("", "cpu, cuda, ...; empty chooses")


def main(config: Config) -> None:
    check_sampling(config)
    if config.batch_size < 1 or config.num_problems < 0:
        raise InputError(f"--batch_size must be at least 1 and --num_problems not negative, found {config.batch_size} "
                         f"and {config.num_problems}")  # fmt: skip
    if config.out and not Path(config.out).resolve().parent.is_dir():
        raise InputError(f"--out {config.out}: there is no folder {Path(config.out).parent}")
    rows = load_jsonl(resolve(config.data, "test"))
    rows = rows[: config.num_problems or None]
    folder = checkpoint_folder(config.model)
    tokenizer = Tokenizer(folder, config.chat, config.system, config.thinking)
    device = choose_device(config.device)
    model = Transformer.from_pretrained(folder, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    s, records = evaluate(
        model, tokenizer, rows, max_new_tokens=config.max_new_tokens, temperature=config.temperature,
        top_k=config.top_k or None, top_p=config.top_p, min_p=config.min_p, num_samples=config.num_samples,
        stop_ids=(*tokenizer.stop_ids, *tokenizer.stop_ids_of(config.stop_tokens)), batch_size=config.batch_size,
        seed=config.seed, progress=True,
    )
    manner = "greedy" if config.temperature == 0 else f"temperature {config.temperature}, top-p {config.top_p}"
    print(
        f"{config.model} on {config.data}: {len(rows)} problems x {config.num_samples}, {manner}, "
        f"cap {config.max_new_tokens}"
    )
    print(f"  accuracy               {s['accuracy']:.3f}  (95% interval {s['low']:.3f} to {s['high']:.3f})")
    print(f"  P(finish)              {s['finish']:.3f}")
    print(f"  accuracy given finish  {s['accuracy_given_finish']:.3f}")
    print(f"  mean length            {s['mean_len']:.1f} tokens")
    print(f"  cap rate               {s['capped']:.3f}")
    print(f"  no answer stated       {s['no_answer']:.3f}")
    print(f"  {s['seconds']:.1f} s")
    if config.out:
        text = json.dumps({"config": asdict(config), "summary": s, "responses": records}, indent=1)
        Path(config.out).write_text(text + "\n", encoding="utf-8")
        print(f"written to {config.out}")


if __name__ == "__main__":
    run_command(main, parse_flags(Config, __doc__))
