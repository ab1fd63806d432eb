"""Accuracy of a checkpoint on problems with a verifiable answer, with the numbers that keep accuracy honest.

    python eval.py --model chains/student --data chains
    python eval.py --model out/step_000030 --data chains --temperature 1 --num_samples 4 --out four.json
    python eval.py --compare before.json,after.json       # a paired test on the same problems
    python eval.py positions | teacher_prefix | stops | tokens | runs     # the diagnostics, see data/diagnose.py

A response is right when its stated answer equals the reference (data/answers.py). Since a model trained on prefixes may
stop ending its responses, accuracy is reported together with P(finish), the share of responses that end by themselves
below the cap, and accuracy among those.
"""

import functools
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from data import InputError, flag, load_jsonl, parse_flags, read_json, resolve, run_command, stop
from data.answers import Judge, extract_answer, is_correct
from data.run import fingerprint, read_kept, rewrite_log
from data.tokenizer import Tokenizer, prompted_as_trained
from loss import distill_loss
from model import Transformer, checkpoint_folder, choose_device
from sample import Rollout, check_sampling, generate

PART = 512  # responses between two calls of evaluate's keep()


def wilson(hits: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """95% interval of a share of n independent trials (Wilson's score interval), which behaves near 0 and 1."""
    share, z2 = hits / n, z * z
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = z / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def bootstrap(values: list[float], seed: int = 0, resamples: int = 2000) -> tuple[float, float]:
    """95% interval of the mean of one value per problem, by drawing the problems again."""
    x = torch.tensor(values, dtype=torch.double)
    picks = torch.randint(len(x), (resamples, len(x)), generator=torch.Generator().manual_seed(seed))
    low, high = x[picks].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.double)).tolist()
    return low, high


def pass_at(k: int, n: int, right: int) -> float:
    """The chance that k of n samples, drawn without replacement, hold a right one: unbiased for pass@k (Chen et al.
    2021, arXiv 2107.03374, equation 1)."""
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


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
    done: list[dict] | None = None,
    keep: Callable[[list[dict]], None] | None = None,
) -> tuple[dict, list[dict]]:
    """Answer every row's prompt `num_samples` times and grade: (summary, one record per response, in the order of
    rows).

    done: records of an earlier, interrupted call with the same arguments, which are taken as they are. keep(records) is
    called with new ones as they come, some hundreds at a time. A row's randomness is its own, so neither changes the
    result, nor does batch_size. Draws from its own generator, so that evaluating inside a training run does not disturb
    the run. See `summarize` for the summary; `seconds` is this call's.
    """
    encoded = [tokenizer.encode_prompt(row["prompt"]) for row in rows]
    longest, positions = max(map(len, encoded)), model.config.max_position_embeddings
    if longest + max_new_tokens > positions:
        raise InputError(f"--max_new_tokens {max_new_tokens} and the longest prompt, {longest} tokens, exceed the "
                         f"{positions} positions of the model")  # fmt: skip
    if not all(encoded):
        raise InputError(f"problem {encoded.index([])}: its prompt is empty")
    order = sorted(range(len(rows)), key=lambda i: -len(encoded[i]))  # neighbours of one length are read together
    drawn = torch.randint(2**63 - 1, (len(rows), num_samples), generator=torch.Generator().manual_seed(seed))
    seeds = {i: drawn[place].tolist() for place, i in enumerate(order)}
    records, start = list(done or []), time.perf_counter()
    waiting = [i for i in order if i not in {r["problem"] for r in records}]
    at_once = max(1, PART // num_samples)
    for part in (waiting[k : k + at_once] for k in range(0, len(waiting), at_once)):
        rollout = generate(
            model, [encoded[i] for i in part], max_new_tokens, stop_ids or tokenizer.stop_ids, temperature, top_k,
            top_p, None, vocab or tokenizer.vocab_size, min_p=min_p, num_samples=num_samples,
            seeds=[s for i in part for s in seeds[i]], slots=batch_size, progress=progress,
        )
        new = []
        for k in range(len(part) * num_samples):
            row, text = rows[part[k // num_samples]], tokenizer.decode(rollout.text_ids(k))
            new.append({
                "problem": part[k // num_samples], "prompt": row["prompt"], "answer": row["answer"], "response": text,
                "extracted": extract_answer(text), "correct": is_correct(text, row["answer"]),
                "finished": bool(rollout.finished[k]), "tokens": int(rollout.lens[k]),
            })
        records += new
        if keep is not None:
            keep(new)
    records.sort(key=lambda r: r["problem"])
    return {**summarize(records, num_samples), "seconds": time.perf_counter() - start}, records


def summarize(records: list[dict], num_samples: int) -> dict[str, float]:
    """Of records in the order of problems, `num_samples` for each: accuracy (the mean over problems of the share of
    right samples, avg@k) with low and high (95% over problems: Wilson's for one sample, else by bootstrap), pass@k for
    k = 1, 2, 4, ... (unbiased), finish (share of responses ended by themselves), accuracy_given_finish (nan if none
    ended), no_answer, capped, mean_len, median_len, len_95 (tokens)."""
    n, ended = len(records), [r for r in records if r["finished"]]
    right = [sum(r["correct"] for r in records[i : i + num_samples]) for i in range(0, n, num_samples)]
    shares = [r / num_samples for r in right]
    low, high = wilson(sum(right), n) if num_samples == 1 else bootstrap(shares)
    lens = torch.tensor([float(r["tokens"]) for r in records])
    ks = [2**j for j in range(num_samples.bit_length()) if num_samples > 1]
    return {
        "accuracy": sum(right) / n, "low": low, "high": high,
        **{f"pass@{k}": sum(pass_at(k, num_samples, r) for r in right) / len(right) for k in ks},
        "finish": len(ended) / n,
        "accuracy_given_finish": sum(r["correct"] for r in ended) / len(ended) if ended else math.nan,
        "no_answer": sum(r["extracted"] is None for r in records) / n, "capped": 1 - len(ended) / n,
        "mean_len": lens.mean().item(), "median_len": lens.median().item(), "len_95": lens.quantile(0.95).item(),
    }


def compare(a: dict, b: dict) -> dict[str, float]:
    """A paired test of two results on the same problems: each one's accuracy, the mean difference per problem with its
    bootstrap interval, and p: how often flipping the signs of the differences at random makes it as large."""
    shares = []
    for result in (a, b):
        by_problem: dict[tuple, list] = {}
        if not isinstance(result.get("responses"), list):
            raise InputError("--compare: expected two files that --out has written")
        for r in result["responses"]:
            by_problem.setdefault((r["data"], r["problem"], r["prompt"]), []).append(float(r["correct"]))
        shares.append({key: sum(v) / len(v) for key, v in by_problem.items()})
    common = sorted(shares[0].keys() & shares[1].keys())
    if not common:
        raise InputError("--compare: the two results have no problem in common")
    d = torch.tensor([shares[1][key] - shares[0][key] for key in common], dtype=torch.double)
    low, high = bootstrap(d.tolist())
    signs = torch.randint(2, (10_000, len(d)), generator=torch.Generator().manual_seed(0)).double() * 2 - 1
    as_large = ((signs * d).mean(1).abs() >= d.mean().abs() - 1e-12).sum().item()
    first, second = (sum(s[key] for key in common) / len(common) for s in shares)
    return {"problems": len(common), "first": first, "second": second, "difference": d.mean().item(), "low": low,
            "high": high, "p": (as_large + 1) / (len(signs) + 1)}  # fmt: skip


def by_position(values: Tensor, position: Tensor) -> dict[str, float]:
    """Mean over the positions 0, 1, 2-3, 4-7, 8-15, ... of the response."""
    bucket = torch.log2(position.double().clamp(min=0.5)).floor().long() + 1  # 0 -> 0, 1 -> 1, 2-3 -> 2, ...
    sums = torch.zeros(int(bucket.max()) + 1, dtype=torch.double).index_add_(0, bucket, values.double())
    counts = torch.bincount(bucket)
    return {str(0 if b == 0 else 2 ** (b - 1)): (sums[b] / counts[b]).item() for b in range(len(counts)) if counts[b]}


@torch.no_grad()
def score(
    rollout: Rollout, student: Transformer, teacher: Transformer, *, stop_ids: tuple[int, ...], vocab: int,
    temperature: float = 1.0, micro_batch: int = 16,
) -> dict[str, Tensor]:
    """Per response token, in the order of micro_batches: its position, and the statistics of distill_loss; float64."""
    stats: dict[str, list] = {}
    for tokens, mask, position in rollout.micro_batches(micro_batch):
        tokens, mask = tokens.to(student.head.device), mask.to(student.head.device)
        _, found = distill_loss(
            student(tokens[:, :-1])[mask], student.head, teacher(tokens[:, :-1])[mask], teacher.head,
            temperature=temperature, vocab=vocab, targets=tokens[:, 1:][mask], stop_ids=stop_ids,
        )
        for name, x in {**found, "position": position}.items():
            stats.setdefault(name, []).append(x.double().cpu())
    return {name: torch.cat(xs) for name, xs in stats.items()}


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
    stats = score(rollout, student, teacher, stop_ids=stop_ids if stop_class else (), vocab=vocab,
                  temperature=temperature, micro_batch=micro_batch)  # fmt: skip
    return {
        "kl": stats["kl"].mean().item(), "kl_by_position": by_position(stats["kl"], stats["position"]),
        "response_len": rollout.lens.double().mean().item(), "finish": rollout.finished.double().mean().item(),
        "seconds": time.perf_counter() - start,
    }


def examine(
    model: Transformer, teacher: Transformer | None, is_student: bool, tokenizer: Tokenizer, test: list[dict], config,
    stop_ids: tuple[int, ...], vocab: int,
) -> tuple[list[dict], str]:
    """What train.py asks of a model during a run, by its `config`: the records for its log, and a line to show. A
    student is judged greedily, sampled, and by its KL to the teacher; a teacher greedily only."""
    records, said = [], []
    common = {"max_new_tokens": config.max_new_tokens, "vocab": vocab, "stop_ids": stop_ids,
              "batch_size": config.batch_size}  # fmt: skip
    manners = (("greedy", 0.0), ("sampled", config.temperature))[: 2 if is_student else 1]
    for manner, temperature in manners if config.eval_problems else ():
        found, _ = evaluate(model, tokenizer, test[: config.eval_problems], temperature=temperature, progress=True,
                            **common)  # fmt: skip
        records.append({"manner": manner, **found})
        said.append(f"{manner} accuracy {found['accuracy']:.3f}")
    if config.eval_kl and teacher is not None and is_student:
        found = measure_kl(
            model, teacher, [tokenizer.encode_prompt(row["prompt"]) for row in test[: config.eval_kl]],
            temperature=config.temperature, stop_class=config.stop_class, micro_batch=config.micro_batch, **common,
        )
        records.append({"manner": "kl", **found})
        said.append(f"held-out KL {found['kl']:.4f} nats a token")
    return records, ", ".join(said)


@dataclass
class Config:
    model: str = flag("chains/student", "checkpoint folder or hub name")
    data: str = flag("chains", "data sets, with commas: names (their test split) or .jsonl files, prompt and answer")
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
    out: str = flag("", "write results to this .json file, and responses to a .jsonl beside it, to go on from")
    compare: str = flag("", "instead: two such files, with a comma between them, for a paired test")
    device: str = flag("", "cpu, cuda, ...; empty chooses")


def main(config: Config) -> None:
    check_sampling(config)
    if config.batch_size < 1 or config.num_problems < 0:
        raise InputError(f"--batch_size must be at least 1 and --num_problems not negative, found {config.batch_size} "
                         f"and {config.num_problems}")  # fmt: skip
    if config.compare:
        files = config.compare.split(",")
        if len(files) != 2:
            raise InputError(f"--compare {config.compare}: expected two files with a comma between them")
        c = compare(*map(read_json, files))
        print(f"{c['problems']} problems in both: {files[0]} {c['first']:.3f}, {files[1]} {c['second']:.3f}; "
              f"difference {c['difference']:+.3f} (95% {c['low']:+.3f} to {c['high']:+.3f}), p = {c['p']:.4f}")
        return
    if config.out and not Path(config.out).resolve().parent.is_dir():
        raise InputError(f"--out {config.out}: there is no folder {Path(config.out).parent}")
    if config.out.endswith(".jsonl"):
        raise InputError(f"--out {config.out}: expected a .json file; the responses go to a .jsonl beside it")
    problems = {}
    for name in config.data.split(","):
        problems[name] = load_jsonl(resolve(name, "test"))[: config.num_problems or None]
    folder = checkpoint_folder(config.model)
    prompted_as_trained(config, folder)
    tokenizer = Tokenizer(folder, config.chat, config.system, config.thinking)
    device = choose_device(config.device)
    model = Transformer.from_pretrained(folder, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    kept = Kept(config, folder) if config.out else None
    if config.temperature == 0:
        manner = "greedy"
    else:
        cuts = [(n, getattr(config, n)) for n, off in (("top_k", 0), ("top_p", 1.0), ("min_p", 0.0))]
        manner = ", ".join([f"temperature {config.temperature}", *(f"{n} {v}" for n, v in cuts if v not in (0, 1.0))])
    print(f"{config.model}: {manner}, {config.num_samples} a problem, cap {config.max_new_tokens}, seed {config.seed}")
    summaries, responses = {}, []
    for name, rows in problems.items():
        done = kept.complete(name, len(rows), config.num_samples) if kept else []
        if done:
            print(f"{name}: {len(done)} responses are in {kept.path} already")
        summaries[name], records = evaluate(
            model, tokenizer, rows, max_new_tokens=config.max_new_tokens, temperature=config.temperature,
            top_k=config.top_k or None, top_p=config.top_p, min_p=config.min_p, num_samples=config.num_samples,
            stop_ids=(*tokenizer.stop_ids, *tokenizer.stop_ids_of(config.stop_tokens)), batch_size=config.batch_size,
            seed=config.seed, progress=True, done=done,
            keep=functools.partial(kept.add, name) if kept else None,
        )
        responses += [{"data": name, **r} for r in records]

    print(f"{'data':15} problems accuracy (95% interval)      P(finish)  accuracy     no    cut at  length: mean,\n"
          f"{'':52} if finished  answer  the cap  median, 95%")
    for name, s in summaries.items():
        print(f"{name:15} {len(problems[name]):8} {s['accuracy']:8.3f} ({s['low']:.3f} to {s['high']:.3f}) "
              f"{s['finish']:9.3f} {s['accuracy_given_finish']:9.3f} {s['no_answer']:9.3f} {s['capped']:8.3f}  "
              f"{s['mean_len']:.1f}, {s['median_len']:.0f}, {s['len_95']:.0f}")
        passes = ", ".join(f"{k} {v:.3f}" for k, v in s.items() if k.startswith("pass@"))
        print(f"{'':15} " + (passes + "; " if passes else "") + f"{s['seconds']:.1f} s")
    if Judge.timeouts:
        print(f"WARNING: math-verify took too long over {Judge.timeouts} answers, which count as wrong; if the machine "
              "was busy, evaluate again")  # fmt: skip
    if config.out:
        text = json.dumps({"config": asdict(config), "summaries": summaries, "responses": responses}, indent=1)
        Path(config.out).write_text(text + "\n", encoding="utf-8")
        print(f"written to {config.out}, and response by response to {kept.path}")


class Kept:
    """Responses in a JSON-lines file, written as they come, so that an evaluation that was killed goes on where it was:
    first a record of what they depend on, then one for each response."""

    def __init__(self, config: Config, folder: Path):
        self.path = Path(config.out).with_suffix(".jsonl")
        made = {k: v for k, v in asdict(config).items() if k not in ("out", "device", "batch_size", "compare", "data")}
        made = json.loads(json.dumps({**made, "weights": fingerprint(folder)}))
        self.records = read_kept(self.path, "weights")
        if self.records and self.records[0] != made:
            differ = [k for k in made if self.records[0].get(k) != made[k]]
            raise InputError(f"--out: {self.path} holds responses of another evaluation ({', '.join(differ)} differ): "
                             "name another file, or delete it")  # fmt: skip
        rewrite_log(self.path, self.records or [made])

    def complete(self, data: str, problems: int, num_samples: int) -> list[dict]:
        """The kept records of those problems that have all their samples."""
        by_problem: dict[int, list] = {}
        for r in self.records[1:]:
            if r["data"] == data and r["problem"] < problems:
                by_problem.setdefault(r["problem"], []).append({k: v for k, v in r.items() if k != "data"})
        return [r for records in by_problem.values() if len(records) == num_samples for r in records]

    def add(self, data: str, records: list[dict]) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write("".join(json.dumps({"data": data, **r}) + "\n" for r in records))


if __name__ == "__main__":
    from data import diagnose  # which imports this file

    command = sys.argv[1] if len(sys.argv) > 1 else ""
    if command == "runs":
        end = next((i for i, a in enumerate(sys.argv) if a.startswith("--")), len(sys.argv))
        folders, rest = sys.argv[2:end], parse_flags(diagnose.RunsConfig, diagnose.__doc__, sys.argv[end:])
        if not folders:
            stop("usage: python eval.py runs RUN_FOLDER ... [--out runs.png]")
        run_command(lambda found: diagnose.compare_runs(found, rest.out), folders)
    elif command in diagnose.COMMANDS:
        run_command(diagnose.COMMANDS[command], parse_flags(diagnose.Config, diagnose.__doc__, sys.argv[2:]))
    elif command and not command.startswith("-"):
        stop(f"{command}: no such command; {', '.join(diagnose.COMMANDS)} and runs are; flags alone measure accuracy")
    else:
        run_command(main, parse_flags(Config, __doc__))
