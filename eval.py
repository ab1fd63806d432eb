"""What a model can do, and where two models differ: accuracy with its error bar, KL to the teacher, diagnostics.

    python eval.py --model data/chains/student --data chains
    python eval.py --model out/step_000020 --temperature 1 --num_samples 4 --out four.json

    python eval.py positions --model data/hops/student,out/step_000020    # KL, entropies, agreement by position
    python eval.py teacher_prefix --lens 0,4,8,16,32,64                   # accuracy after k tokens of the teacher's
    python eval.py tokens --index 3 --out tokens.html                     # one response, coloured by KL
    python eval.py runs out_a out_b ...                                   # accuracy and KL against FLOP

A response is right when its stated answer equals the reference (data/answers.py). Since a model trained on prefixes may
stop ending its responses, accuracy is reported together with P(finish), the share of responses that end by themselves
below the cap, and accuracy among those. The diagnostics are the paper's observations: the numbers are made here and
written as .json, data/plots.py draws them.

Read from here down: a pair of models; accuracy; KL; the check before a run; the command line; the diagnostics.
"""

import itertools
import json
import math
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from data import InputError, embedded_model, fail, load_jsonl, plots, read_json, resolve, run_command
from data.answers import Verifier, extract_answer, is_correct, opens_thought
from data.checkpoint import checkpoint_folder, load_config
from data.flags import flag, parse_flags
from data.ranks import all_gather, join, leave, rank, world_size
from data.run import fingerprint, read_log
from data.tokenizer import Tokenizer, as_trained, check_same
from loss import distill_loss
from model import Transformer, choose_device, load_teacher
from sample import Rollout, fit_cap, generate, shorten

# --- a pair of models


@dataclass
class Pair:
    student: Transformer | None  # float32 weights: at a rate of 1e-6 a bfloat16 weight would not move
    sampler: Transformer  # what samples: the student itself, or a copy in `dtype`
    teacher: Transformer | None  # may be sharded over ranks, and then only scores
    tokenizer: Tokenizer
    teacher_tokenizer: Tokenizer | None
    vocab: int  # ids below it are tokens to both; rows of the heads from it on are padding
    stop_ids: tuple[int, ...]  # all that end a response for either
    merged_stops: tuple[int, ...]  # those that are one outcome in the loss: all, or none with --stop_class off
    dtype: torch.dtype  # of the forward passes


def load_tokenizers(
    folder: Path, teacher: str = "", *, chat: str = "auto", system: str = "", thinking: str = "", stop_tokens: str = ""
) -> tuple[Tokenizer, Tokenizer | None, int, tuple[int, ...]]:
    """(the tokenizer of a checkpoint, its teacher's or None, number of real tokens, stop ids of both). An id is real if
    both tokenizers have it and both heads a row for it. Raises InputError where an id means different things to them.
    """
    ours, teachers = Tokenizer(folder, chat, system, thinking), None
    vocab, stop_ids = min(ours.vocab_size, load_config(folder).vocab_size), {*ours.stop_ids}
    stop_ids |= {*ours.stop_ids_of(stop_tokens)}
    if teacher:
        folder = checkpoint_folder(teacher)
        teachers = Tokenizer(folder, "off" if chat == "off" else "auto")  # tells whether it has the switch
        if teachers.chats():
            switch = thinking if "enable_thinking" in teachers.chat_template() else ""
            teachers = Tokenizer(folder, chat, system, switch)
        check_same(ours, teachers)
        vocab = min(vocab, teachers.vocab_size, load_config(folder, any_family=True).get_text_config().vocab_size)
        stop_ids |= {*teachers.stop_ids}
    return ours, teachers, vocab, tuple(sorted(i for i in stop_ids if i < vocab))


def teacher_template(config, rows: list[dict]) -> str:
    """--teacher_prompt, or else the `teacher_prompt` field of the first row, which then holds for all rows."""
    return config.teacher_prompt or rows[0].get("teacher_prompt") or ""


def encode_prompts(rows: list[dict], tokenizer: Tokenizer, vocab: int, where: str, template: str = "",
                   teacher_tokenizer: Tokenizer | None = None) -> None:
    """Add `prompt_ids` to rows, and `teacher_ids`, what a teacher reads before the response: the same ids, or a
    template whose {fields} are the row's, rendered by the teacher's own tokenizer. vocab: how many ids the models know.
    where: the flag that names the rows, for messages.
    """
    fields = re.findall(r"\{(\w+)\}", template)
    if template and not fields:
        raise InputError(f"--teacher_prompt {template!r}: expected the name of a row's field in it, such as {{prompt}}")
    for number, row in enumerate(tqdm(rows, desc="tokenize", leave=False, delay=2, disable=None), start=1):
        row["prompt_ids"] = row["teacher_ids"] = tokenizer.encode_prompt(row["prompt"])
        if not row["prompt_ids"]:
            raise InputError(f"{where}, row {number}: its prompt is empty, and this tokenizer puts nothing before it")
        for field in fields:
            if not isinstance(row.get(field), str):
                raise InputError(f"--teacher_prompt: row {number} of {where} has no text {field!r}, only "
                                 + ", ".join(name for name in row if isinstance(row[name], str)))
        if template:
            text = re.sub(r"\{(\w+)\}", lambda found, row=row: row[found[1]], template)
            row["teacher_ids"] = teacher_tokenizer.encode_prompt(text)
            if not row["teacher_ids"]:
                raise InputError(f"--teacher_prompt: of row {number} of {where} it makes an empty prompt")
        tokenizer.check_ids(row["prompt_ids"] + row["teacher_ids"], vocab, f"{where}, row {number}")


# --- accuracy


def wilson(hits: float, n: int) -> tuple[float, float]:
    """95% interval of a share of n independent trials (Wilson's score interval), which behaves near 0 and 1."""
    share, z, z2 = hits / n, 1.96, 1.96**2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = z / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def bootstrap(values: list[float]) -> tuple[float, float]:
    """95% interval of the mean of one value per problem, by drawing the problems again."""
    x = torch.tensor(values, dtype=torch.double)
    picks = torch.randint(len(x), (2000, len(x)), generator=torch.Generator().manual_seed(0))
    low, high = x[picks].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.double)).tolist()
    return low, high


def seeds_of(seed: int, problems: int, num_samples: int = 1) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2**63 - 1, (problems, num_samples), generator=generator).tolist()


def grade(response: str, row: dict, tokenizer: Tokenizer) -> dict:
    answer = row["answer"] if isinstance(row.get("answer"), str) else None
    opened = opens_thought(tokenizer.decode(row["prompt_ids"]))
    return {"answer": answer, "extracted": extract_answer(response, opened),
            "correct": answer is not None and is_correct(response, answer, opened)}


def evaluate(
    model: Transformer, tokenizer: Tokenizer, rows: list[dict], *, max_new_tokens: int, stop_ids: tuple[int, ...],
    temperature: float = 0.0, top_k: int | None = None, top_p: float | None = None, num_samples: int = 1,
    slots: int | None = None, seed: int = 1337, done: list[dict] | None = None,
    keep: Callable[[list[dict]], None] = lambda records: None,
) -> tuple[dict, list[dict]]:
    """Answer every row's `prompt_ids` `num_samples` times and grade by its `answer`, if it has one: (summary, one
    record per response, in the order of rows).

    done: records of an earlier, interrupted call with the same arguments, which are taken as they are. keep(records) is
    called with new ones as they come, some hundreds at a time. A response depends on its own seed alone, so neither
    changes the result, nor does `slots`. Several ranks share the problems, and each returns all records. See
    `summarize` for the summary; `seconds` is this call's.
    """
    start, timeouts = time.perf_counter(), Verifier.timeouts
    seeds = seeds_of(seed, len(rows), num_samples)
    mine, have = [], {(r["problem"], r["sample"]) for r in done or []}
    waiting = [(i, k) for i in range(len(rows)) for k in range(num_samples) if (i, k) not in have]
    waiting.sort(key=lambda place: -len(rows[place[0]]["prompt_ids"]))  # prompts of one length are read together
    waiting = waiting[rank() :: world_size()]
    for part in (waiting[n : n + 512] for n in range(0, len(waiting), 512)):
        rollout = generate(
            model, [rows[i]["prompt_ids"] for i, _ in part], max_new_tokens, stop_ids, temperature, top_k, top_p,
            seeds=[seeds[i][k] for i, k in part], slots=slots, progress=rank() == 0,
        )
        new = []
        for n, (i, k) in enumerate(part):
            text = tokenizer.decode(rollout.text_ids(n))
            new.append({
                "problem": i, "sample": k, "prompt": rows[i]["prompt"], "response": text, "ids": rollout.response(n),
                **grade(text, rows[i], tokenizer), "finished": bool(rollout.finished[n]),
                "tokens": int(rollout.lens[n]),
            })
        mine += new
        keep(new)
    records = [*(done or []), *itertools.chain(*all_gather(mine))]
    if timeouts := sum(all_gather(Verifier.timeouts - timeouts)):
        print(f"WARNING: math-verify took too long over {timeouts} answers, which count as wrong")
    records.sort(key=lambda r: (r["problem"], r["sample"]))
    return {**summarize(records, num_samples), "seconds": time.perf_counter() - start}, records


def summarize(records: list[dict], num_samples: int) -> dict[str, float]:
    """Of records in the order of problems, `num_samples` for each: finish (share of responses ended by themselves),
    mean_len, median_len, len_95 (tokens); and where all problems have an answer, accuracy (the mean over problems of
    the share of right samples, avg@k) with low and high (95% over problems: by bootstrap, but Wilson's for one sample
    or where fewer than five problems differ from the most frequent share), accuracy_given_finish (None if none ended),
    no_answer (share of responses)."""
    n, ended = len(records), [r for r in records if r["finished"]]
    lens = torch.tensor([float(r["tokens"]) for r in records])
    found = {"finish": len(ended) / n, "mean_len": lens.mean().item(), "median_len": lens.median().item(),
             "len_95": lens.quantile(0.95).item()}
    if any(r["answer"] is None for r in records):
        return found
    right = [sum(r["correct"] for r in records[i : i + num_samples]) for i in range(0, n, num_samples)]
    shares = [r / num_samples for r in right]
    unlike = len(right) - max(Counter(right).values())  # problems with another share than the most frequent
    few = num_samples == 1 or unlike < 5  # of which a bootstrap would make too narrow an interval
    low, high = wilson(sum(shares), len(shares)) if few else bootstrap(shares)
    return found | {
        "accuracy": sum(right) / n, "low": low, "high": high,
        "accuracy_given_finish": sum(r["correct"] for r in ended) / len(ended) if ended else None,
        "no_answer": sum(r["extracted"] is None for r in records) / n,
    }


def by_position(values: Tensor, position: Tensor) -> dict[str, float]:
    """Mean of values (n,) over the response positions 0, 1, 2-3, 4-7, 8-15, ..., by the first position of each group.
    position (n,). Groups without values are left out."""
    bucket = torch.log2(position.double().clamp(min=0.5)).floor().long() + 1  # 0 -> 0, 1 -> 1, 2-3 -> 2, ...
    sums = torch.zeros(int(bucket.max()) + 1, dtype=torch.double).index_add_(0, bucket, values.double())
    counts = torch.bincount(bucket)
    return {str(0 if b == 0 else 2 ** (b - 1)): (sums[b] / counts[b]).item() for b in range(len(counts)) if counts[b]}


# --- KL to the teacher


@torch.no_grad()
def score(
    rollout: Rollout, student: Transformer, teacher: Transformer, *, stop_ids: tuple[int, ...] = (),
    temperature: float = 1.0, micro_tokens: int = 8192,
) -> dict[str, Tensor]:
    """Per supervised token, in the order of micro_batches: its position, and the statistics of distill_loss; float64.
    """
    stats: dict[str, list] = {}
    for rows in rollout.micro_batches(micro_tokens):
        tokens, at, targets, position = rollout.part(rows, student.device)
        tokens_t, at_t, _, _ = rollout.for_teacher.part(rows, teacher.device)
        hidden_s, hidden_t = student(tokens).flatten(0, 1)[at], teacher(tokens_t).flatten(0, 1)[at_t]
        _, found = distill_loss(
            hidden_s, student.head.detach(), hidden_t.to(student.device), teacher.head.to(student.device),
            temperature=temperature, targets=targets, vocab=student.vocab, stop_ids=stop_ids,
        )
        for name, x in {**found, "position": position}.items():
            stats.setdefault(name, []).append(x.double().cpu())
    return {name: torch.cat(xs) for name, xs in stats.items()}


# --- before a run


@torch.no_grad()
def preflight(pair: Pair, rows: list[dict], prefix_len: int, temperature: float, seed: int) -> list[str]:
    """Check a pair before it is trained: lines to print, in plain language, the warnings last.

    A few prompts are answered by the student, and both models are asked two questions that betray most mismatches: what
    should come first, and how likely is each stop token where the student stopped?
    """
    lines, warnings, tokenizer, teacher_tokenizer = [], [], pair.tokenizer, pair.teacher_tokenizer
    cap = min(prefix_len, 1024)

    def spell(i: int) -> str:
        return f"{i} {tokenizer.decode([i])!r}"

    prompts = [row["prompt_ids"] for row in rows]
    teacher_reads_other = rows[0]["teacher_ids"] != prompts[0]  # as --teacher_prompt asked
    lines.append(f"prompt as {'the student sees' if teacher_reads_other else 'both models see'} it: "
                 f"{tokenizer.decode(prompts[0])!r}")
    rendered = teacher_tokenizer.encode_prompt(rows[0]["prompt"])
    if teacher_reads_other:
        lines.append(f"prompt as the teacher sees it: {teacher_tokenizer.decode(rows[0]['teacher_ids'])!r}")
    elif rendered != prompts[0]:
        warnings.append(
            "template mismatch: the teacher's own chat template would render this prompt as "
            f"{teacher_tokenizer.decode(rendered)!r}. A teacher scores badly what it was not trained to read; "
            "compare --chat on and --chat off, or give the student the teacher's template"
        )

    rollout = generate(pair.sampler, prompts, cap, pair.stop_ids, temperature,
                       seeds=[seed + i for i in range(len(prompts))])
    ends = []  # (2, vocab) per row and model: log-probabilities where a response begins and where it ends
    for i, row in enumerate(rows):
        for model, prompt in ((pair.sampler, row["prompt_ids"]), (pair.teacher, row["teacher_ids"])):
            ids = torch.tensor([prompt + rollout.response(i)[:-1]], device=model.device)
            hidden = model(ids)[0, [len(prompt) - 1, -1]]  # (2, H)
            ends.append(model.logits(hidden).log_softmax(-1).cpu())
    first, last = torch.stack(ends).unflatten(0, (-1, 2)).unbind(2)  # (prompts, 2 models, vocab) each
    ended = [rollout.response(i)[-1] for i in range(len(rows)) if rollout.finished[i]]
    p, q = first.exp().mean(0)  # (vocab,) each, over the prompts
    kl = (first[:, 0].exp() * (first[:, 0] - first[:, 1])).sum(-1).mean()
    lines.append(
        f"first token: KL {kl:.2f} nats; most likely {spell(int(p.argmax()))} to the student ({p.max():.2f}), "
        f"{spell(int(q.argmax()))} to the teacher ({q.max():.2f})"
    )
    for writer, reader, a, b in (("teacher", "student", q, p), ("student", "teacher", p, q)):
        opener = int(a.argmax())
        text = tokenizer.decode([opener])
        if text in tokenizer.special and opener not in pair.stop_ids and a[opener] > 0.5 and b[opener] < 0.1:
            found = f"{text!r} ({a[opener]:.2f}), the {reader} does not ({b[opener]:.1e})"
            warnings.append(
                f"thinking-mode mismatch: the {writer} opens with {found}. Choose --thinking off, or a pair of one mode"
                if "think" in text else
                f"template mismatch: the {writer} expects {found}, so the prompt probably lacks a part of the "
                f"{writer}'s template. See --chat"
            )
    stops = f"stops: {len(ended)} of {len(prompts)} responses ended within {cap:,} tokens"
    if ended:
        p, q = last[rollout.finished].exp().mean(0)
        stops += "; there, on average, " + ", ".join(
            f"{spell(i)}: student {p[i]:.1e}, teacher {q[i]:.1e}" for i in pair.stop_ids)
        used, preferred = max(set(ended), key=ended.count), max(pair.stop_ids, key=lambda i: q[i])
        if preferred != used and q[preferred] > 100 * q[used]:
            warnings.append(
                f"stop mismatch: the student ends with {spell(used)}, the teacher with {spell(preferred)}. " + (
                    "Losses with a teacher take them as one, so this costs nothing" if pair.merged_stops else
                    "Every stop will be punished and responses will run to the cap: do not turn --stop_class off")
            )
    lines.append(stops)
    lines.append(f"the first response:\n{shorten(tokenizer.decode(rollout.text_ids(0)), 12)}")
    return lines + [f"WARNING: {w}" for w in warnings]


# --- the command line


@dataclass
class Config:
    typed = ()  # names of the flags that were typed; parse_flags sets it

    model: str = flag("", "checkpoint folder or hub name, with commas between several for a diagnostic; empty takes "
                      "the student of --data")
    teacher: str = flag("", "diagnostics: checkpoint folder or hub name; empty takes the teacher of --data")
    teacher_prompt: str = flag("", "diagnostics: what the teacher reads before a response, with {fields} of the row; "
                               "by default as in a checkpoint's training")
    data: str = flag("hops", "data set: a name (its test split) or a .jsonl file; by default a checkpoint's own")
    num_problems: int = flag(0, "use the first this many problems; 0 takes all, or 200 for a diagnostic", least=0)
    num_samples: int = flag(1, "accuracy: responses per problem, of which it is the mean (avg@k)", least=1)
    temperature: float = flag(0.0, "0 takes the most likely token, 1 samples from the model's own distribution "
                              "(diagnostics: 1 by default)", least=0, below=math.inf)
    top_k: int = flag(0, "accuracy: sample among the k most likely tokens only; 0 is off", least=0)
    top_p: float = flag(1.0, "accuracy: sample among the most likely tokens that hold this much probability; 1 is off",
                        above=0, most=1)
    stop_tokens: str = flag("", "stop tokens besides those the checkpoint declares, comma-separated names or ids")
    stop_class: bool = flag(True, "diagnostics: merge the stop tokens of both models before the divergence is taken")
    chat: str = flag("auto", "auto: through the chat template where there is one; on: demand it; off: the bare prompt")
    system: str = flag("", "text of a system turn before the prompt, for checkpoints with a chat template")
    thinking: str = flag("", "on or off, for chat templates that have the switch", choices=("", "on", "off"))
    max_new_tokens: int = flag(4096, "cap on the response", least=1)
    batch_size: int = flag(256, "responses sampled together; lower it if memory runs out", least=1)
    micro_tokens: int = flag(8192, "diagnostics: tokens scored together, padding included; lower it if memory runs out",
                             least=1)
    lens: str = flag("0,1,2,4,8,16,32,64,128", "teacher_prefix: how many tokens the teacher writes first")
    index: int = flag(0, "tokens: which problem", least=0)
    seed: int = flag(1337, "seed of the sampling", least=0)
    out: str = flag("", "accuracy: a .json file to write; responses go to a .jsonl beside it as they come, and an "
                    "interrupted evaluation goes on from there. Diagnostics: the picture, numbers in a .json beside it")
    device: str = flag("", "cpu, cuda, ...; empty chooses")


def load_models(config: Config, need: tuple[str, ...] = ("prompt",), with_teacher: bool = False):
    """(models of --model by path, the teacher or None, tokenizer, stop ids, rows of --data with their prompt_ids)"""
    paths = (config.model or embedded_model(config.data, "student", "model")).split(",")
    folders, device = [checkpoint_folder(path) for path in paths], choose_device(config.device)
    for folder in folders:
        as_trained(config, folder)
    if with_teacher:
        config.teacher = config.teacher or embedded_model(config.data, "teacher", "teacher")
    teacher = config.teacher if with_teacher else ""
    rows = load_jsonl(resolve(config.data, "test"), need)[: config.num_problems or None]
    agreed = [load_tokenizers(  # each must agree with the teacher on every id
        folder, teacher, chat=config.chat, system=config.system, thinking=config.thinking,
        stop_tokens=config.stop_tokens) for folder in folders]
    tokenizer, teachers, _, _ = agreed[0]
    vocab = min(a[2] for a in agreed)  # one vocabulary, and one set of stops, for all
    stop_ids = tuple(sorted({i for a in agreed for i in a[3] if i < vocab}))
    template = teacher_template(config, rows) if teacher else ""
    encode_prompts(rows, tokenizer, vocab, "--data", template, teachers)
    models = {path: Transformer.frozen(path, device, vocab) for path in paths}
    scorer = load_teacher(teacher, device, vocab) if teacher else None
    for model in filter(None, (*models.values(), scorer)):
        prompts = [row["teacher_ids" if model is scorer else "prompt_ids"] for row in rows]
        fit_cap(config, "max_new_tokens", prompts, model.config.max_position_embeddings)
    return models, scorer, tokenizer, stop_ids, rows


def main(config: Config) -> None:
    """Accuracy of one model on one data set."""
    join()
    check_out(config.out, ".json")
    if "," in config.model:
        raise InputError(f"--model {config.model}: expected one model; several are for diagnostics")
    if config.temperature == 0 and (config.num_samples > 1 or config.top_k or config.top_p < 1):
        raise InputError("--num_samples, --top_k and --top_p are for sampling: add --temperature 1")
    models, _, tokenizer, stop_ids, rows = load_models(config, need=("prompt", "answer"))
    path, model = next(iter(models.items()))
    file = Path(config.out).with_suffix(".jsonl") if config.out else None
    fresh = not file or rank()
    done = all_gather([] if fresh else kept_responses(config, file, checkpoint_folder(path), rows, tokenizer))[0]

    def keep(records: list[dict]) -> None:
        if file is not None:
            lines = "".join(json.dumps({k: v for k, v in r.items() if k != "ids"}) + "\n" for r in records)
            with open(file, "ab", buffering=0) as f:  # in one piece: other ranks write, too
                f.write(lines.encode())

    found, records = evaluate(
        model, tokenizer, rows, max_new_tokens=config.max_new_tokens, stop_ids=stop_ids,
        temperature=config.temperature, top_k=config.top_k or None, top_p=config.top_p, num_samples=config.num_samples,
        slots=config.batch_size, seed=config.seed, keep=keep,
        done=[r for r in done if answers_one_of(rows, r)],
    )
    print(f"the first problem:\n{shorten(rows[0]['prompt'].strip(), 8)}\nthe response:\n"
          f"{shorten(records[0]['response'], 24)}\n\n"
          f"{path} on {config.data}: {len(rows)} problems, answers to each: {config.num_samples}, temperature "
          f"{config.temperature}, seed {config.seed}; {found['seconds']:.1f} s\n"
          f"accuracy {found['accuracy']:.3f} (95%: {found['low']:.3f} to {found['high']:.3f})"
          f"\nP(finish) {found['finish']:.3f}, accuracy if finished {found['accuracy_given_finish'] or 0:.3f}, "
          f"without an answer {found['no_answer']:.3f}\n"
          f"length: mean {found['mean_len']:.1f}, median {found['median_len']:.0f}, "
          f"95% below {found['len_95']:.0f} tokens; cut at {config.max_new_tokens}: {1 - found['finish']:.3f}")
    if config.out and rank() == 0:
        text = json.dumps({"config": asdict(config), "summary": found}, indent=1)
        Path(config.out).write_text(text + "\n", encoding="utf-8")
        print(f"written: {config.out}, and response by response {file}")
    leave()


def check_out(out: str, suffix: str) -> None:
    """End the program where --out could not be written after all the work."""
    path = Path(out)
    if out and (path.suffix != suffix or path.is_dir() or not path.resolve().parent.is_dir()):
        fail(f"--out {out}: expected a {suffix} file in a folder that exists")
    numbers = Path(f"{out.removesuffix(suffix)}.json")
    if suffix != ".json" and numbers.is_file() and b'"summary": {' in numbers.read_bytes():
        fail(f"--out {out}: its numbers go to {numbers}, which holds an accuracy; choose another name")


def answers_one_of(rows: list[dict], record: dict) -> bool:
    return record["problem"] < len(rows) and record["prompt"] == rows[record["problem"]]["prompt"]


def kept_responses(config: Config, file: Path, folder: Path, rows: list[dict], tokenizer: Tokenizer) -> list[dict]:
    """Responses of an earlier evaluation that was interrupted, graded again, since an answer or the grader may have
    been mended. The first line of the file says what they depend on, and must be the same."""
    matters = ("data", "num_samples", "temperature", "top_k", "top_p", "stop_tokens", "chat", "system", "thinking",
               "max_new_tokens", "seed")
    made = {name: getattr(config, name) for name in matters}
    made |= {"on cuda": choose_device(config.device).type == "cuda", "weights": fingerprint(folder)}
    records = read_log(file) if file.is_file() else [made]
    if records[:1] != [made]:
        raise InputError(f"--out: {file} exists and holds something else, or responses made with other flags or "
                         "weights: name another file, or delete it")
    once = {(r["problem"], r["sample"]): r for r in records[1:]}.values()
    records = [made, *(r | grade(r["response"], rows[r["problem"]], tokenizer) if answers_one_of(rows, r) else r
                       for r in once)]
    temporary = file.with_name(f"{file.name}.incomplete")  # without a torn line
    temporary.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    os.replace(temporary, file)
    if len(records) > 1:
        print(f"{len(records) - 1} responses are in {file} already")
    return records[1:]


# --- the paper's observations: each returns what its picture in data/plots.py shows


def load_students(config: Config, need: tuple[str, ...] = ("prompt",)):
    """As load_models, with a teacher, and sampling at temperature 1 unless another was asked for."""
    config.temperature = config.temperature if "temperature" in config.typed else 1.0
    return load_models(config, need, with_teacher=True)


def sample_responses(model: Transformer, prompts: list[list[int]], config: Config, stop_ids, given: int = 0) -> Rollout:
    """Responses; `given` of their tokens stand in the prompts already, and count towards the cap. The rest has other
    seeds: with the same, its j-th token would reuse the random number that drew the j-th given one."""
    seeds = [config.seed + 1_000_003 * given + i for i in range(len(prompts))]
    return generate(model, prompts, config.max_new_tokens - given, stop_ids, config.temperature, progress=True,
                    seeds=seeds, slots=config.batch_size)


def respond_for_both(model: Transformer, rows: list[dict], config: Config, stop_ids) -> Rollout:
    """Responses of a student, as it and the teacher read them."""
    rollout = sample_responses(model, [row["prompt_ids"] for row in rows], config, stop_ids)
    rollout.for_teacher = rollout.with_prompts([row["teacher_ids"] for row in rows])
    return rollout


def diagnose_positions(config: Config) -> dict:
    """KL, both entropies and top-1 agreement by response position, in bins whose edges grow by a factor of 2^(1/3),
    with 95% bands of the mean (tokens taken as independent). Bins of fewer than min(10, responses) tokens are omitted.
    """
    students, teacher, _, stop_ids, rows = load_students(config)
    rows, curves = rows[: config.num_problems or 200], {}
    edges = torch.tensor(sorted({round(2 ** (i / 3)) for i in range(3 * 20)}))
    for name, student in students.items():
        rollout = respond_for_both(student, rows, config, stop_ids)
        stats = score(rollout, student, teacher, stop_ids=stop_ids if config.stop_class else (),
                      temperature=config.temperature or 1.0, micro_tokens=config.micro_tokens)
        at = stats["position"].long()
        total = stats["kl"].sum()
        print(f"{name}: KL {stats['kl'].mean():.4f} nats per token over {len(at):,} tokens; share of all KL in the "
              "first " + ", ".join(f"{n}: {stats['kl'][at < n].sum() / total:.0%}" for n in (1, 4, 16, 64, 256, 1024))
              + f" tokens; the student's perplexity {stats['student_logprob'].mean().neg().exp():.3f}")
        bins = torch.bucketize(at + 1, edges, right=True) - 1
        shown = [b for b in bins.unique().tolist() if (bins == b).sum() >= min(10, len(rows))]
        curves[name] = {"position": [(at[bins == b] + 1).double().mean().item() for b in shown],
                        "tokens": [int((bins == b).sum()) for b in shown]}
        for key in ("kl", "student_entropy", "teacher_entropy", "agree"):
            groups = [stats[key][bins == b] for b in shown]
            curves[name][key] = [g.mean().item() for g in groups]
            curves[name][f"{key}_half_width"] = [1.96 * g.std(correction=0).item() / len(g) ** 0.5 for g in groups]
    return {"config": asdict(config), "curves": curves}


def diagnose_teacher_prefix(config: Config) -> dict:
    """Accuracy of each student after k tokens of the teacher's."""
    if not re.fullmatch(r"\d+(,\d+)*", config.lens):
        raise InputError(f"--lens {config.lens}: expected numbers from 0 on, with commas between them")
    lens = sorted({int(n) for n in config.lens.split(",")})
    students, teacher, tokenizer, stop_ids, rows = load_students(config, ("prompt", "answer"))
    rows, curves = rows[: config.num_problems or 200], {}
    prompts = [row["prompt_ids"] for row in rows]
    given = sample_responses(teacher, [row["teacher_ids"] for row in rows], config, stop_ids)
    for (name, student), k in itertools.product(students.items(), lens):
        texts = [given.text_ids(i) for i in range(len(rows))]
        open_rows = [i for i in range(len(rows)) if given.lens[i] > k]  # the others were given whole
        if open_rows:
            rest = sample_responses(student, [prompts[i] + texts[i][:k] for i in open_rows], config, stop_ids, given=k)
        for n, i in enumerate(open_rows):
            texts[i] = texts[i][:k] + rest.text_ids(n)
        right = sum(is_correct(tokenizer.decode(text), row["answer"], opens_thought(tokenizer.decode(prompt)))
                    for text, row, prompt in zip(texts, rows, prompts))
        low, high = wilson(right, len(rows))
        point = {"k": k, "accuracy": right / len(rows), "low": low, "high": high,
                 "given_whole": 1 - len(open_rows) / len(rows)}
        curves.setdefault(name, []).append(point)
        print(f"{name} after {k} tokens of the teacher's: accuracy {point['accuracy']:.3f} ({low:.3f} to {high:.3f}); "
              f"{point['given_whole']:.0%} of the responses were given whole")
    return {"config": asdict(config), "curves": curves}


def diagnose_tokens(config: Config) -> dict:
    """One response of each student, token by token: its KL, both models' probability of it, and the three tokens that
    each finds most likely. "cuts": where the prefix of a checkpoint's run ends, where that is one place."""
    students, teacher, tokenizer, stop_ids, rows = load_students(config)
    if config.index >= len(rows):
        raise InputError(f"--index {config.index}: the data has rows 0 to {len(rows) - 1}")
    row, pages, cuts, merged = rows[config.index], {}, {}, list(stop_ids) if config.stop_class else []
    temperature = config.temperature or 1.0

    def preferred(model: Transformer, rollout: Rollout) -> list[list[tuple[str, float]]]:
        found, (ids, at, _, _) = [], rollout.part(torch.tensor([0]), model.device)
        for hidden in model(ids)[0, at].split(256):
            p = (model.logits(hidden) / temperature).softmax(-1)
            if merged:  # one class, as in the KL
                p[:, merged[:1]] = p[:, merged].sum(1, keepdim=True)
                p[:, merged[1:]] = 0
            chance, token = (x.tolist() for x in p.topk(3))
            found += [[(tokenizer.decode([i]), round(c, 6)) for i, c in zip(*top)] for top in zip(token, chance)]
        return found

    for name, student in students.items():
        rollout = respond_for_both(student, [row], config, stop_ids)
        stats = score(rollout, student, teacher, stop_ids=merged, temperature=temperature)
        numbers = zip(rollout.response(0), *(stats[k].tolist() for k in ("kl", "student_logprob", "teacher_logprob")),
                      preferred(student, rollout), preferred(teacher, rollout.for_teacher))
        pages[name] = [
            {"text": tokenizer.decode([i]), "kl": kl, "student": math.exp(log_p), "teacher": math.exp(log_q),
             "student_top": student_top, "teacher_top": teacher_top}
            for i, kl, log_p, log_q, student_top, teacher_top in numbers
        ]
        state = checkpoint_folder(name) / "state.json"
        run = read_json(state).get("config", {}) if state.is_file() else {}
        one = run.get("window") in ("prefix", "first") and run.get("schedule") == "constant" and not run.get("mix")
        cuts[name] = run["prefix_len"] if one else None
    return {"config": asdict(config), "prompt": row["prompt"], "responses": pages, "cuts": cuts}


if __name__ == "__main__":
    command = sys.argv[1] if len(sys.argv) > 1 and not sys.argv[1].startswith("-") else ""
    diagnostics = {"positions": diagnose_positions, "teacher_prefix": diagnose_teacher_prefix,
                   "tokens": diagnose_tokens}
    if command == "runs":
        end = next((i for i, a in enumerate(sys.argv) if a.startswith("--")), len(sys.argv))
        if end == 2 and "--help" not in sys.argv:
            fail("usage: python eval.py runs RUN_FOLDER ... [--out runs.png]")
        config = parse_flags(Config, __doc__, sys.argv[end:])
        check_out(config.out, ".png")
        run_command(lambda c: plots.draw_runs(sys.argv[2:end], c.out or "runs.png"), config)
    elif command in diagnostics:
        work, suffix = diagnostics[command], ".html" if command == "tokens" else ".png"
        config = parse_flags(Config, __doc__, sys.argv[2:])
        check_out(config.out, suffix)
        run_command(lambda c: plots.draw_diagnostic(command, work(c), c.out), config)
    elif command:
        fail(f"{command}: no such command; {', '.join(diagnostics)} and runs are; flags alone measure accuracy")
    else:
        run_command(main, parse_flags(Config, __doc__))
