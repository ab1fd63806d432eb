"""Accuracy of a checkpoint on problems with a verifiable answer, with the numbers that keep accuracy honest.

    python eval.py --model chains/student --data chains
    python eval.py --model out/step_000030 --data chains --temperature 1 --num_samples 4

A response is right when its stated answer equals the reference (data/answers.py). Since a model trained on prefixes may stop
ending its responses, accuracy is reported together with P(finish), the share of responses that end by themselves below
the cap, and accuracy among those.
"""

import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from data import InputError, flag, load_jsonl, parse_flags, resolve, run_command
from data.answers import extract_answer, is_correct
from data.tokenizer import Tokenizer
from model import Transformer, checkpoint_folder, choose_device
from sample import generate


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
    num_samples: int = 1,
    batch_size: int = 128,
    seed: int = 1337,
    vocab: int | None = None,
    stop_ids: tuple[int, ...] | None = None,
    progress: bool = False,
) -> tuple[dict, list[dict]]:
    """Answer every row's prompt `num_samples` times and grade: (summary, one record per response, in the order of rows).

    Summary, all floats: accuracy (mean over problems of the share of right samples), low and high (Wilson 95% over
    problems), finish (share of responses ended by themselves), accuracy_given_finish (nan if none ended), no_answer,
    capped, mean_len (tokens), seconds.
    Draws from its own generator, so that evaluating inside a training run does not disturb the run.
    """
    from tqdm import tqdm

    generator = torch.Generator().manual_seed(seed)
    encoded = [tokenizer.encode_prompt(row["prompt"]) for row in rows]
    order = sorted(range(len(rows)), key=lambda i: -len(encoded[i]))  # neighbours of one length share a batch
    jobs = [i for i in order for _ in range(num_samples)]
    records: list[dict] = []
    start = time.perf_counter()
    for first in tqdm(range(0, len(jobs), batch_size), desc="eval", disable=not progress, leave=False):
        part = jobs[first : first + batch_size]
        rollout = generate(
            model, [encoded[i] for i in part], max_new_tokens, stop_ids or tokenizer.stop_ids, temperature, top_k, top_p,
            generator, vocab or tokenizer.vocab_size,
        )
        for k, i in enumerate(part):
            text = tokenizer.decode(rollout.text_ids(k))
            records.append({
                "problem": i, "prompt": rows[i]["prompt"], "answer": rows[i]["answer"], "response": text,
                "extracted": extract_answer(text), "correct": is_correct(text, rows[i]["answer"]),
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


@dataclass
class Config:
    model: str = flag("chains/student", "checkpoint folder or hub name")
    data: str = flag("chains", "data set: a name (its test split) or a .jsonl file with prompt and answer")
    num_problems: int = flag(0, "evaluate the first this many problems; 0 takes all")
    num_samples: int = flag(1, "responses per problem; accuracy is their mean (avg@k)")
    temperature: float = flag(0.0, "0 takes the most likely token, 1 samples from the model's own distribution")
    top_k: int = flag(0, "sample among the k most likely tokens only; 0 is off")
    top_p: float = flag(1.0, "sample among the most likely tokens that hold this much probability; 1 is off")
    max_new_tokens: int = flag(512, "cap on the response")
    batch_size: int = flag(128, "responses sampled together; lower it if memory runs out")
    seed: int = flag(1337, "seed of the sampling")
    out: str = flag("", "write summary and every response to this .json file")
    device: str = flag("", "cpu, cuda, ...; empty chooses")


def main(config: Config) -> None:
    for name in ("num_samples", "max_new_tokens", "batch_size"):
        if getattr(config, name) < 1:
            raise InputError(f"--{name} must be at least 1, found {getattr(config, name)}")
    rows = load_jsonl(resolve(config.data, "test"))
    rows = rows[: config.num_problems or None]
    folder = checkpoint_folder(config.model)
    tokenizer = Tokenizer(folder)
    model = Transformer.from_pretrained(folder, choose_device(config.device))
    s, records = evaluate(
        model, tokenizer, rows, max_new_tokens=config.max_new_tokens, temperature=config.temperature,
        top_k=config.top_k or None, top_p=config.top_p, num_samples=config.num_samples, batch_size=config.batch_size,
        seed=config.seed, progress=True,
    )
    manner = "greedy" if config.temperature == 0 else f"temperature {config.temperature}, top-p {config.top_p}"
    print(f"{config.model} on {config.data}: {len(rows)} problems x {config.num_samples}, {manner}, cap {config.max_new_tokens}")
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
