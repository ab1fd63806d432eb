"""The paper's observations as pictures, each with the numbers behind it beside it (.png and .json of one name).

    python eval.py positions --student chains/student,out/step_000030     # KL, entropies, agreement by position
    python eval.py teacher_prefix --lens 0,4,8,16,32,64                   # accuracy after k tokens of the other model
    python eval.py stops                                                  # probability of each stop id at rollout ends
    python eval.py tokens --index 3 --out tokens.html                     # one response, coloured by KL
    python eval.py runs out_a out_b ...                                   # accuracy and KL against FLOP, tokens, time

Every `--student` may be a list with commas: the same checkpoint before, during and after training.
"""

import html
import itertools
import json
import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from data import InputError, flag, load_jsonl, resolve
from data.answers import is_correct
from data.run import read_log
from data.tokenizer import Tokenizer, check_same, prompted_as_trained
from eval import score, wilson
from model import Transformer, checkpoint_folder, choose_device
from sample import Rollout, generate

# Okabe and Ito's colours, told apart by those who do not see red or green, and in grey by their lightness
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
STYLES = ("-", "--", "-.", ":")


@dataclass
class Config:
    student: str = flag("chains/student", "checkpoint folders or hub names, with commas between several")
    teacher: str = flag("chains/teacher", "checkpoint folder or hub name")
    data: str = flag("chains", "data set: a name (its test split) or a .jsonl file")
    responses: str = flag("student", "positions: whose responses the two are compared on, student or teacher")
    num_problems: int = flag(200, "problems to answer, from the first")
    index: int = flag(0, "tokens: which problem")
    lens: str = flag("0,1,2,4,8,16,32,64,128", "teacher_prefix: how many tokens the other model writes first")
    max_new_tokens: int = flag(512, "cap on responses")
    temperature: float = flag(1.0, "of the sampling; the divergences are those of the models' own distributions")
    stop_class: bool = flag(True, "merge the stop tokens of both models before the divergence is taken")
    stop_tokens: str = flag("", "stop tokens besides those the checkpoints declare, comma-separated names or ids")
    chat: str = flag("auto", "auto: through the chat template where there is one; on: demand it; off: the bare prompt")
    system: str = flag("", "text of a system turn before the prompt, for checkpoints with a chat template")
    thinking: str = flag("", "on or off, for chat templates that have the switch")
    batch_size: int = flag(64, "responses sampled together; lower it when memory runs out")
    micro_batch: int = flag(16, "responses scored together; likewise")
    seed: int = flag(1337, "of the sampling")
    out: str = flag("", "file to write, by default the command's name with .png (tokens: .html)")
    device: str = flag("", "cpu, cuda, ...; empty chooses")


def load(config: Config):
    """(students by name, teacher, tokenizer, stop ids, real vocabulary, rows with their encoded prompts)"""
    if config.responses not in ("student", "teacher"):
        raise InputError(f"--responses {config.responses}: expected student or teacher")
    for name in ("num_problems", "max_new_tokens", "batch_size", "micro_batch"):
        if getattr(config, name) < 1:
            raise InputError(f"--{name} must be at least 1, found {getattr(config, name)}")
    device = choose_device(config.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    folders = [checkpoint_folder(path) for path in config.student.split(",")]
    prompted_as_trained(config, folders[-1])
    tokenizer = Tokenizer(folders[0], config.chat, config.system, config.thinking)
    theirs = Tokenizer(checkpoint_folder(config.teacher), "off")
    check_same(tokenizer, theirs)
    vocab = min(tokenizer.vocab_size, theirs.vocab_size)
    stops = {*tokenizer.stop_ids, *theirs.stop_ids, *tokenizer.stop_ids_of(config.stop_tokens)}
    rows = load_jsonl(resolve(config.data, "test"), need=("prompt",))
    if not 0 <= config.index < len(rows):
        raise InputError(f"--index {config.index}: the data has rows 0 to {len(rows) - 1}")
    for row in rows:
        row["prompt_ids"] = tokenizer.encode_prompt(row["prompt"])
    names = [f"{f.parent.name}/{f.name}" for f in folders]
    if len(set(names)) < len(names):
        names = [str(f) for f in folders]
    students = {name: Transformer.from_pretrained(f, device, dtype) for name, f in zip(names, folders)}
    teacher = Transformer.from_pretrained(checkpoint_folder(config.teacher), device, dtype)
    return students, teacher, tokenizer, tuple(sorted(i for i in stops if i < vocab)), vocab, rows


def answer(model, rows: list[dict], config: Config, stop_ids, vocab: int, forced=None, temperature=None) -> Rollout:
    return generate(
        model,
        [row["prompt_ids"] for row in rows],
        config.max_new_tokens,
        stop_ids,
        config.temperature if temperature is None else temperature,
        vocab=vocab,
        forced=forced,
        generator=torch.Generator().manual_seed(config.seed),
        slots=config.batch_size,
        progress=True,
    )


def score_all(rollout: Rollout, student, teacher, config: Config, stop_ids, vocab: int) -> dict[str, torch.Tensor]:
    """eval.py's score, by this command's flags."""
    return score(rollout, student, teacher, stop_ids=stop_ids if config.stop_class else (), vocab=vocab,
                 micro_batch=config.micro_batch)  # fmt: skip


def accuracy(rollout: Rollout, rows: list[dict], tokenizer: Tokenizer) -> dict[str, float]:
    """Share right, and its Wilson 95% interval; the answer must be the row's."""
    right = sum(is_correct(tokenizer.decode(rollout.text_ids(i)), row["answer"]) for i, row in enumerate(rows))
    low, high = wilson(right, len(rows))
    return {"accuracy": right / len(rows), "low": low, "high": high}


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


# --- the pictures


def axes(rows: int, columns: int, width: float = 5.0, height: float = 3.2):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt.subplots(rows, columns, figsize=(width * columns, height * rows), squeeze=False, layout="constrained")


def write(figure, out: str, numbers: dict) -> None:
    path = Path(out)
    figure.savefig(path, dpi=130)
    path.with_suffix(".json").write_text(json.dumps(numbers, indent=1) + "\n")
    print(f"written: {path} and {path.with_suffix('.json')}")


def positions(config: Config) -> None:
    """KL, both entropies and top-1 agreement by response position, with 95% bands of the mean (tokens taken as
    independent). The numbers are per position, the drawing joins thirds of octaves; what fewer than 10 tokens stand
    behind is left out."""
    students, teacher, _, stop_ids, vocab, rows = load(config)
    panels = {
        "kl": "reverse KL, nats",
        "student_entropy": "student's entropy, nats",
        "teacher_entropy": "teacher's entropy, nats",
        "agree": "top-1 agreement",
    }
    figure, grid = axes(2, 2)
    numbers = {"config": asdict(config)}
    for number, (name, student) in enumerate(students.items()):
        if config.responses == "student" or number == 0:
            writer = student if config.responses == "student" else teacher
            rollout = answer(writer, rows[: config.num_problems], config, stop_ids, vocab)
        stats = score_all(rollout, student, teacher, config, stop_ids, vocab)
        at = stats["position"].long()
        count = torch.bincount(at).double()
        shown = (count >= min(10, config.num_problems)).nonzero()[:, 0]
        numbers[name] = {"position": shown.tolist(), "responses": count[shown].tolist()}
        total = stats["kl"].sum()
        print(
            f"{name}: KL {stats['kl'].mean():.4f} nats a token over {len(at):,} tokens; share of all KL in the first "
            + ", ".join(f"{n}: {stats['kl'][at < n].sum() / total:.0%}" for n in (1, 4, 16, 64))
            + f" tokens; the student's perplexity {stats['student_logprob'].mean().neg().exp():.3f}"
        )
        edges = sorted({round(2 ** (i / 3)) for i in range(3 * 20)})  # drawn by thirds of an octave, or nothing is seen
        binned = torch.bucketize(at + 1, torch.tensor(edges), right=True) - 1
        for panel, (key, label) in zip(grid.flat, panels.items()):
            mean = torch.zeros_like(count).index_add_(0, at, stats[key]) / count
            spread = torch.zeros_like(count).index_add_(0, at, (stats[key] - mean[at]) ** 2) / (count - 1).clamp(min=1)
            half = 1.96 * (spread / count).sqrt()
            numbers[name][key] = {"mean": mean[shown].tolist(), "half_width": half[shown].tolist()}
            kept = [b for b in binned.unique().tolist() if (binned == b).sum() >= min(10, config.num_problems)]
            groups = [stats[key][binned == b] for b in kept]
            x = [(at[binned == b] + 1).double().mean().item() for b in kept]
            y = torch.stack([g.mean() for g in groups])
            half = torch.stack([1.96 * g.std(correction=0) / len(g) ** 0.5 for g in groups])
            color, style = COLORS[number % 8], STYLES[number % 4]
            if key == "agree":
                low, high = y - half, (y + half).clamp(max=1)
            else:  # on a logarithmic axis a band that touches zero would fill the picture
                panel.set_yscale("log")
                low, high = torch.maximum(y - half, y / 3), y + half
            panel.plot(x, y, style, color=color, label=name, linewidth=1.5, marker="o", markersize=3)
            panel.fill_between(x, low, high, color=color, alpha=0.2)
            panel.set(xlabel="response position (1 is the first)", ylabel=label, xscale="log")
    grid[0, 0].legend(fontsize=8)
    figure.suptitle(
        f"Student against teacher by position; responses are the {config.responses}'s ({config.data})", fontsize=11
    )
    write(figure, config.out or "positions.png", numbers)


def teacher_prefix(config: Config) -> None:
    """Accuracy of the student after k tokens of the teacher's, and of the teacher after k tokens of the student's."""
    students, teacher, tokenizer, stop_ids, vocab, rows = load(config)
    try:
        lens = sorted({int(n) for n in config.lens.split(",")})
    except ValueError:
        raise InputError(f"--lens {config.lens}: expected numbers with commas between them") from None
    rows = rows[: config.num_problems]
    if any("answer" not in row for row in rows):
        raise InputError(f"--data {config.data}: teacher_prefix grades answers, and a row has none")
    figure, grid = axes(1, 1, 7, 4.2)
    numbers, number = {"config": asdict(config)}, 0
    theirs = answer(teacher, rows, config, stop_ids, vocab)
    for name, student in students.items():
        ours = answer(student, rows, config, stop_ids, vocab)
        for label, writer, first in (
            (f"{name} after k tokens of the teacher's", student, theirs),
            (f"teacher after k tokens of {name}'s", teacher, ours),
        ):
            curve = []
            for k in lens:
                forced = [first.response(i)[:k] for i in range(len(rows))]
                rollout = answer(writer, rows, config, stop_ids, vocab, forced)
                over = sum(len(first.response(i)) <= k for i in range(len(rows))) / len(rows)
                curve.append({"k": k, **accuracy(rollout, rows, tokenizer), "given_whole": over})
                print(
                    f"{label}, k = {k}: accuracy {curve[-1]['accuracy']:.3f} ({curve[-1]['low']:.3f} to "
                    f"{curve[-1]['high']:.3f}); {over:.0%} of the responses were given whole"
                )
            numbers[label] = curve
            y = [point["accuracy"] for point in curve]
            color = COLORS[number % 8]
            x = range(len(lens))
            grid[0, 0].plot(x, y, STYLES[number % 4], marker="o", markersize=4, color=color, label=label)
            grid[0, 0].fill_between(
                x, [p["low"] for p in curve], [p["high"] for p in curve], color=color, alpha=0.15
            )
            number += 1
    grid[0, 0].set(
        xlabel="k, tokens given",
        ylabel="accuracy (band: 95%)",
        ylim=(-0.02, 1.02),
        title=f"Who starts decides ({config.data}, temperature {config.temperature})",
    )
    grid[0, 0].set_xticks(range(len(lens)), [str(k) for k in lens])
    grid[0, 0].legend(fontsize=8)
    write(figure, config.out or "teacher_prefix.png", numbers)


@torch.no_grad()
def stops(config: Config) -> None:
    """Probability of each stop id, by both models, where responses ended by themselves and where they were cut."""
    students, teacher, tokenizer, stop_ids, vocab, rows = load(config)
    rows = rows[: config.num_problems]
    figure, grid = axes(len(students), 1, 7, 3.4)
    numbers = {"config": asdict(config)}
    for panel, (name, student) in zip(grid[:, 0], students.items()):
        rollout, at_end = answer(student, rows, config, stop_ids, vocab), []
        for i in range(len(rows)):
            sequence = rollout.tokens[i, : int(rollout.prompt_lens[i] + rollout.lens[i]) - 1][None].to(
                student.head.device
            )
            at_end.append(
                torch.stack(
                    [
                        (m(sequence)[0, -1].float() @ m.head[:vocab].float().T).softmax(-1)[list(stop_ids)]
                        for m in (student, teacher)
                    ]
                ).cpu()
            )
        at_end = torch.stack(at_end)  # (rows, 2 models, stop ids)
        bars = {}
        for what, chosen in (("ended by themselves", rollout.finished), ("cut at the cap", ~rollout.finished)):
            for model, m in (("student", 0), ("teacher", 1)):
                if chosen.any():
                    bars[f"{model}, {int(chosen.sum())} {what}"] = at_end[chosen, m].double().mean(0).tolist()
        numbers[name] = {"stop_ids": {i: tokenizer.decode([i]) for i in stop_ids}, **bars}
        print(f"{name}: {rollout.finished.double().mean():.1%} of {len(rows)} responses ended by themselves")
        for k, (label, values) in enumerate(bars.items()):
            print(
                f"  {label}: " + ", ".join(f"{i} {tokenizer.decode([i])!r} {p:.2e}" for i, p in zip(stop_ids, values))
            )
            x = [j + (k - len(bars) / 2 + 0.5) * 0.8 / len(bars) for j in range(len(stop_ids))]
            panel.bar(x, [max(p, 1e-12) for p in values], 0.75 / len(bars), color=COLORS[k % 8], label=label)
        panel.set(
            yscale="log", ylim=(1e-12, 3), ylabel="mean probability", title=f"Stop tokens where responses of {name} end"
        )
        panel.set_xticks(range(len(stop_ids)), [f"{i} {tokenizer.decode([i])}" for i in stop_ids])
        panel.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncol=2)
    write(figure, config.out or "stops.png", numbers)


PAGE = """<!doctype html><meta charset='utf-8'><title>KL by token</title>
<style>body{font:16px/1.7 monospace;max-width:60em;margin:2em auto;white-space:pre-wrap}
h2,p{font-family:sans-serif;white-space:normal}</style>"""


def tokens(config: Config) -> None:
    """One response of each student as a page of text, coloured by KL; nothing in it is taken for markup."""
    students, teacher, tokenizer, stop_ids, vocab, rows = load(config)
    row = rows[config.index]
    page = [PAGE]
    for name, student in students.items():
        rollout = answer(student, [row], config, stop_ids, vocab)
        stats = score_all(rollout, student, teacher, config, stop_ids, vocab)
        page.append(
            f"<h2>{html.escape(name)}</h2><p>Prompt, then its response; the redder a token, the larger the reverse KL "
            f"at its position. Mean {stats['kl'].mean():.3f} nats; hover for numbers.</p>{html.escape(row['prompt'])}"
        )
        for i, kl, ours, theirs in zip(
            rollout.response(0), *(stats[k].tolist() for k in ("kl", "student_logprob", "teacher_logprob"))
        ):
            text = html.escape(tokenizer.decode([i]))
            shade = min(1.0, math.log1p(max(kl, 0)) / math.log1p(10))  # 10 nats and more are fully red
            title = f"KL {kl:.3f}; student {math.exp(ours):.3f}, teacher {math.exp(theirs):.2e}"
            page.append(f"<span style='background:rgba(213,94,0,{shade:.2f})' title='{title}'>{text}</span>")
        page.append("\n")
    path = Path(config.out or "tokens.html")
    path.write_text("".join(page), encoding="utf-8")
    print(f"written: {path}")


# --- any number of runs


@dataclass
class RunsConfig:
    out: str = flag("runs.png", "the picture of `eval.py runs FOLDER ...`; its numbers go beside it, as .json")


def curve(folder: Path) -> dict:
    """{'config', 'points': [{flop, tokens, seconds, and what was evaluated there}]} of a run's folder."""
    file = folder / "log.jsonl"
    if not file.is_file():
        raise InputError(f"{folder}: no log.jsonl there, so it is no run's folder")
    spent, points = {0: {"flop": 0.0, "tokens": 0, "seconds": 0.0}}, {}
    for r in read_log(file):
        if "loss" in r:
            spent[r["step"]] = {
                "flop": r["total_flop"],
                "tokens": r["total_tokens_trained"],
                "seconds": r["total_seconds"],
            }
        elif r["eval"] == "student":
            point = points.setdefault(r["step"], {"step": r["step"], **spent[r["step"]]})
            if r["manner"] == "kl":
                point["kl"] = r["kl"]
            else:
                point |= {
                    f"{r['manner']}_accuracy": r["accuracy"],
                    f"{r['manner']}_finish": r["finish"],
                    f"{r['manner']}_length": r["mean_len"],
                }
    config = json.loads((folder / "config.json").read_text())
    if config["schedule"] == "constant":  # then these mean nothing
        config |= dict.fromkeys(("prefix_start", "schedule_steps", "stair"))
    elif config["schedule"] != "staircase":
        config["stair"] = None
    return {"config": config, "points": [points[s] for s in sorted(points)]}


def flop_to_reach(points: list[dict], key: str, goal: float) -> float:
    """FLOP at which the metric first reaches the goal, interpolated between evaluations; nan if it never does."""
    for before, after in itertools.pairwise(points):
        if before[key] < goal <= after[key]:
            return before["flop"] + (after["flop"] - before["flop"]) * (goal - before[key]) / (after[key] - before[key])
    return 0.0 if points and points[0][key] >= goal else math.nan


def at_cost(points: list[dict], key: str, cost: str, spent: float) -> float:
    """The metric when so much of `cost` ("flop", "tokens", "seconds") had been spent, interpolated between evaluations;
    nan if the run ended before."""
    for before, after in itertools.pairwise(points):
        if before[cost] <= spent <= after[cost]:
            share = (spent - before[cost]) / max(after[cost] - before[cost], 1e-30)
            return before[key] + (after[key] - before[key]) * share
    return math.nan


def group_runs(folders: list[str]) -> dict[str, list[dict]]:
    """Runs that differ in nothing but the seed go together. The name of a group is what sets it apart."""
    runs = [curve(Path(f)) for f in folders]
    ignored = {
        "seed",
        "out_dir",
        "save_every",
        "eval_every",
        "keep",
        "resume",
        "overwrite",
        "micro_batch",
        "memory",
        "wandb_project",
        "plan",
        "plan_lens",
        "teacher_cache",
    }
    known = dict.fromkeys(k for r in runs for k in r["config"])  # an older run lacks the flags made since
    keys = [k for k in known if k not in ignored and len({str(r["config"].get(k) or 0) for r in runs}) > 1]
    groups: dict[str, list[dict]] = {}
    for run in runs:
        said = [f"{k} {run['config'].get(k)}" for k in keys if run["config"].get(k) not in (None, 0)]
        groups.setdefault(", ".join(said) or "all runs", []).append(run)

    def by_number(name: str) -> list:
        return [(0, float(w), "") if re.fullmatch(r"[\d.e-]+", w) else (1, 0.0, w) for w in name.split()]

    return {name: groups[name] for name in sorted(groups, key=by_number)}


def compare_runs(folders: list[str], out: str = "runs.png", goals: tuple[float, ...] = (0.5, 0.7, 0.8, 0.9)) -> None:
    """Draw accuracy, KL, P(finish) and length of run folders against FLOP, tokens and seconds; print the FLOP to reach
    each accuracy and the saving over the group with the longest constant prefix, and what all groups had reached when
    a half, and all, of the FLOP (tokens) of the cheapest were spent."""
    groups = group_runs(folders)
    rows = {
        "sampled_accuracy": "accuracy, sampled",
        "greedy_accuracy": "accuracy, greedy",
        "kl": "held-out KL, nats a token",
        "sampled_finish": "P(finish), sampled",
        "sampled_length": "length, sampled, tokens",
    }
    rows = {k: v for k, v in rows.items() if all(k in p for g in groups.values() for r in g for p in r["points"])}
    if not rows or not all(r["points"] for g in groups.values() for r in g):
        raise InputError("runs: no metric was evaluated in all of these runs; train with --eval_every")
    columns = {"flop": "training FLOP", "tokens": "tokens trained on", "seconds": "seconds of training"}
    figure, grid = axes(len(rows), len(columns), 4.6, 2.8)
    numbers: dict = {}
    for number, (name, runs) in enumerate(groups.items()):
        steps = sorted(set.intersection(*({p["step"] for p in r["points"]} for r in runs)))
        at = [[next(p for p in r["points"] if p["step"] == s) for s in steps] for r in runs]  # (runs, steps)
        color, style = COLORS[number % 8], STYLES[number // 8 % 4]
        numbers[name] = {"seeds": [r["config"]["seed"] for r in runs], "steps": steps, "points": at}
        for i, key in enumerate(rows):
            for j, cost in enumerate(columns):
                x = torch.tensor([[p[cost] for p in points] for points in at]).double().mean(0)
                y = torch.tensor([[p[key] for p in points] for points in at]).double()
                panel = grid[i, j]
                panel.plot(x, y.mean(0), style, marker="o", markersize=3, color=color, label=name, linewidth=1.3)
                if len(runs) > 1:
                    panel.fill_between(x, y.amin(0), y.amax(0), color=color, alpha=0.15)
                panel.set(xlabel=columns[cost], ylabel=rows[key] if j == 0 else None)
                if key == "kl":
                    panel.set_yscale("log")
    grid[0, 0].legend(fontsize=7)
    several = max(len(runs) for runs in groups.values())
    spread = ", mean (lowest to highest seed)" if several > 1 else ""
    figure.suptitle(f"Mean over seeds (up to {several}); band: lowest to highest seed", fontsize=11)

    constant = [n for n, runs in groups.items() if runs[0]["config"]["schedule"] == "constant"] or list(groups)
    full = max(constant, key=lambda n: groups[n][0]["config"]["prefix_len"])
    for key, goal in itertools.product([k for k in rows if k.endswith("accuracy")], goals):
        needed = {n: [flop_to_reach(r["points"], key, goal) for r in runs] for n, runs in groups.items()}
        numbers.setdefault(f"flop_to_reach_{key}", {})[str(goal)] = needed
        if all(math.isnan(v) for values in needed.values() for v in values):
            continue
        print(f"\nFLOP until {rows[key]} reaches {goal}{spread}, and the saving over '{full}':")
        for name, values in needed.items():
            reached = [v for v in values if not math.isnan(v)]
            line = f"  {name:40} {len(reached)} of {len(values)} runs"
            if reached:
                line += f", {sum(reached) / len(reached):.3g}"
                line += f" ({min(reached):.3g} to {max(reached):.3g})" if several > 1 else ""
                if len(reached) == len(values) and not math.isnan(sum(needed[full])) and sum(reached) > 0:
                    line += f", {sum(needed[full]) / len(needed[full]) / (sum(reached) / len(reached)):.2f}x"
            print(line)
    for cost, part in itertools.product(("flop", "tokens"), (0.5, 1.0)):
        spent = part * min(r["points"][-1][cost] for runs in groups.values() for r in runs)
        print(f"\nAt {spent:.3g} {columns[cost].removeprefix('training ')}{spread}:")
        equal = {name: {k: [at_cost(r["points"], k, cost, spent) for r in runs] for k in rows}
                 for name, runs in groups.items()}  # fmt: skip
        numbers.setdefault(f"at_equal_{cost}", {})[str(spent)] = equal
        for name, found in equal.items():
            print(f"  {name:40} " + ", ".join(
                f"{rows[k]} {sum(v) / len(v):.3f}" + (f" ({min(v):.3f} to {max(v):.3f})" if several > 1 else "")
                for k, v in found.items()
                if k == "kl" or k.endswith("accuracy")))  # fmt: skip
    write(figure, out, numbers)


COMMANDS = {"positions": positions, "teacher_prefix": teacher_prefix, "stops": stops, "tokens": tokens}
