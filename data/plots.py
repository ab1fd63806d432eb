"""Pictures, from logs and JSON numbers alone, and the comparison of any number of runs (`python eval.py runs`)."""

import itertools
import json
import math
import re
from pathlib import Path

from data import InputError
from data.run import read_log

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")  # Okabe and Ito's
STYLES = ("-", "--", "-.", ":")


def axes(rows: int, columns: int, width: float = 5.0, height: float = 3.2):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt.subplots(rows, columns, figsize=(width * columns, height * rows), squeeze=False, layout="constrained")


def draw_diagnostic(kind: str, numbers: dict, out: str) -> None:
    """The picture of a diagnostic of eval.py, its numbers beside it as .json."""
    path = Path(out or f"{kind}.{'html' if kind == 'tokens' else 'png'}")
    path.with_suffix(".json").write_text(json.dumps(numbers, indent=1) + "\n")
    if kind == "tokens":
        path.write_text(tokens_page(numbers), encoding="utf-8")
    else:
        figure = draw_positions(numbers) if kind == "positions" else draw_teacher_prefix(numbers)
        figure.savefig(path, dpi=130)
    print(f"written: {path} and {path.with_suffix('.json')}")


def draw_positions(numbers: dict):
    panels = {"kl": "reverse KL, nats", "student_entropy": "student's entropy, nats",
              "teacher_entropy": "teacher's entropy, nats", "agree": "top-1 agreement"}
    figure, grid = axes(2, 2)
    for number, (name, curve) in enumerate(numbers["curves"].items()):
        color, style = COLORS[number % 8], STYLES[number % 4]
        for panel, (key, label) in zip(grid.flat, panels.items()):
            y, half = curve[key], curve[f"{key}_half_width"]
            low = [a - h if key == "agree" else max(a - h, a / 3) for a, h in zip(y, half)]  # a logarithm needs > 0
            panel.plot(curve["position"], y, style, color=color, label=name, linewidth=1.5, marker="o", markersize=3)
            panel.fill_between(curve["position"], low, [a + h for a, h in zip(y, half)], color=color, alpha=0.2)
            panel.set(xlabel="response position (1 is the first)", ylabel=label, xscale="log",
                      yscale="linear" if key == "agree" else "log")
    grid[0, 0].legend(fontsize=8)
    config = numbers["config"]
    figure.suptitle(f"Student against teacher by position; responses are the {config['responses']}'s "
                    f"({config['data']}); bands: 95%", fontsize=11)
    return figure


def draw_teacher_prefix(numbers: dict):
    figure, grid = axes(1, 1, 7, 4.2)
    for number, (label, points) in enumerate(numbers["curves"].items()):
        x, color = range(len(points)), COLORS[number % 8]
        grid[0, 0].plot(x, [p["accuracy"] for p in points], STYLES[number % 4], marker="o", markersize=4, color=color,
                        label=label)
        grid[0, 0].fill_between(x, [p["low"] for p in points], [p["high"] for p in points], color=color, alpha=0.15)
        grid[0, 0].set_xticks(x, [str(p["k"]) for p in points])
    config = numbers["config"]
    grid[0, 0].set(xlabel="k, tokens given", ylabel="accuracy (band: 95%)", ylim=(-0.02, 1.02),
                   title=f"Who starts decides ({config['data']}, temperature {config['temperature']})")
    grid[0, 0].legend(fontsize=8)
    return figure


def tokens_page(numbers: dict) -> str:
    """The page data/tokens.html with the numbers in it; without a "<", no text can end the script that holds them."""
    page = (Path(__file__).parent / "tokens.html").read_text(encoding="utf-8")
    return page.replace("__NUMBERS__", json.dumps(numbers).replace("<", "\\u003c"))


# --- any number of runs


COSTS = {"flop": "training FLOP", "tokens": "tokens trained on", "seconds": "seconds of training"}
METRICS = {"sampled_accuracy": "accuracy, sampled", "greedy_accuracy": "accuracy, greedy",
           "kl": "held-out KL, nats a token", "sampled_finish": "P(finish), sampled",
           "sampled_length": "length, sampled, tokens"}
NOT_COMPARED = {"seed", "out_dir", "save_every", "eval_every", "keep", "resume", "overwrite", "micro_tokens", "plan"}


def read_run(folder: Path) -> dict:
    """{"config", "points": [{step, flop, tokens, seconds, and the metrics evaluated there}]} of a run's folder."""
    if not (folder / "log.jsonl").is_file():
        raise InputError(f"{folder}: no log.jsonl there, so it is no run's folder")
    spent, points = {0: {"flop": 0.0, "tokens": 0, "seconds": 0.0}}, {}
    for r in read_log(folder / "log.jsonl"):
        if "loss" in r:
            spent[r["step"]] = {"flop": r["total_flop"], "tokens": r["total_tokens_trained"],
                                "seconds": r["total_seconds"]}
        elif r["eval"] == "student":
            point, kind = points.setdefault(r["step"], {"step": r["step"], **spent[r["step"]]}), r["kind"]
            point |= {"kl": r["kl"]} if kind == "kl" else {
                f"{kind}_accuracy": r["accuracy"], f"{kind}_finish": r["finish"], f"{kind}_length": r["mean_len"]}
    config = json.loads((folder / "config.json").read_text())
    if config["schedule"] == "constant":  # then these mean nothing
        config["prefix_start"] = None
    return {"config": config, "points": [points[s] for s in sorted(points)]}


def group_runs(folders: list[str]) -> dict[str, list[dict]]:
    """Runs that differ in nothing but the seed go together, under the flags that set them apart from the others."""
    runs, groups = [read_run(Path(f)) for f in folders], {}
    known = dict.fromkeys(k for r in runs for k in r["config"])
    keys = [k for k in known if k not in NOT_COMPARED and len({str(r["config"].get(k) or 0) for r in runs}) > 1]
    for run in runs:
        name = ", ".join(f"{k} {run['config'][k]}" for k in keys if run["config"].get(k) not in (None, 0))
        groups.setdefault(name or "all runs", []).append(run)

    def by_number(name: str) -> list:
        words = [word.rstrip(",") for word in name.split()]
        return [(0, float(w), "") if re.fullmatch(r"\d[\d.e-]*", w) else (1, 0.0, w) for w in words]

    return {name: groups[name] for name in sorted(groups, key=by_number)}


def cost_to_reach(points: list[dict], key: str, goal: float, cost: str = "flop") -> float:
    """The cost at which a metric first reaches the goal, interpolated between evaluations; nan if it never does."""
    if points[0][key] >= goal:
        return points[0][cost]
    for a, b in itertools.pairwise(points):
        if a[key] < goal <= b[key]:
            return a[cost] + (b[cost] - a[cost]) * (goal - a[key]) / (b[key] - a[key])
    return math.nan


def metric_at(points: list[dict], key: str, cost: str, spent: float) -> float:
    """A metric when so much had been spent, interpolated between evaluations; nan if the run ended before."""
    for a, b in itertools.pairwise(points):
        if a[cost] <= spent <= b[cost]:
            return a[key] + (b[key] - a[key]) * (spent - a[cost]) / max(b[cost] - a[cost], 1e-30)
    return math.nan


def mean_and_range(values: list[float]) -> str:
    """"1.2 (1.1 to 1.3)", over those that are numbers."""
    values = [v for v in values if not math.isnan(v)]
    if not values:
        return "not reached"
    spread = f" ({min(values):.3g} to {max(values):.3g})" if len(values) > 1 else ""
    return f"{sum(values) / len(values):.3g}{spread}"


def draw_runs(folders: list[str], out: str, goals: tuple[float, ...] = (0.5, 0.7, 0.8, 0.9)) -> None:
    """Draw accuracies and KL of run folders against FLOP, the mean over seeds with bars from the lowest to the highest;
    print what it took to reach each accuracy, and what all had reached for the same cost."""
    groups = group_runs(folders)
    metrics = {k: v for k, v in METRICS.items()
               if all(k in p for runs in groups.values() for r in runs for p in r["points"])}
    if not metrics or not all(r["points"] for runs in groups.values() for r in runs):
        raise InputError("runs: no metric was evaluated in all of these runs; train with --eval_every")
    shown = [k for k in ("sampled_accuracy", "greedy_accuracy", "kl") if k in metrics]
    figure, grid = axes(1, len(shown), 4.6, 3.6)
    numbers: dict = {}
    for number, (name, runs) in enumerate(groups.items()):
        steps = sorted(set.intersection(*({p["step"] for p in r["points"]} for r in runs)))
        at = [[next(p for p in r["points"] if p["step"] == s) for s in steps] for r in runs]  # (runs, steps)
        numbers[name] = {"seeds": [r["config"]["seed"] for r in runs], "steps": steps, "points": at}
        color, style = COLORS[number % 8], STYLES[number // 8 % 4]
        for panel, key in zip(grid[0], shown):
            x = [sum(p["flop"] for p in points) / len(runs) / 1e12 for points in zip(*at)]
            y = [[p[key] for p in points] for points in zip(*at)]  # (steps, runs)
            middle = [sum(v) / len(v) for v in y]
            low, high = [min(v) for v in y], [max(v) for v in y]
            spread = [[max(0, m - x) for m, x in zip(middle, low)], [max(0, x - m) for m, x in zip(middle, high)]]
            panel.errorbar(x, middle, spread, fmt=style + "o", markersize=4, capsize=3, color=color, label=name)
            panel.set(xlabel="training TFLOP", title=metrics[key])
            panel.set_yscale("log" if key == "kl" else "linear")
            panel.grid(alpha=0.3)
    grid[0, 0].legend(fontsize=8)
    several = max(len(runs) for runs in groups.values())
    figure.suptitle(f"Mean over seeds (up to {several}); bars: lowest to highest seed", fontsize=10)

    for key, goal in itertools.product([k for k in metrics if k.endswith("accuracy")], goals):
        needed = {n: [cost_to_reach(r["points"], key, goal) for r in runs] for n, runs in groups.items()}
        numbers.setdefault(f"flop_to_reach_{key}", {})[str(goal)] = needed
        if not all(math.isnan(v) for values in needed.values() for v in values):
            print(f"\nFLOP until {metrics[key]} reaches {goal}:")
            for name, values in needed.items():
                reached = sum(not math.isnan(v) for v in values)
                print(f"  {name:40} {reached} of {len(values)} runs, {mean_and_range(values)}")
    for cost, part in itertools.product(("flop", "tokens"), (0.5, 1.0)):
        spent = part * min(r["points"][-1][cost] for runs in groups.values() for r in runs)
        print(f"\nAt {spent:.3g} {COSTS[cost].removeprefix('training ')}:")
        for name, runs in groups.items():
            found = {k: [metric_at(r["points"], k, cost, spent) for r in runs] for k in metrics}
            numbers.setdefault(f"at_equal_{cost}", {}).setdefault(str(spent), {})[name] = found
            print(f"  {name:40} " + ", ".join(f"{metrics[k]} {mean_and_range(v)}" for k, v in found.items()
                                              if k == "kl" or k.endswith("accuracy")))
    path = Path(out)
    figure.savefig(path, dpi=130)
    path.with_suffix(".json").write_text(json.dumps(numbers, indent=1) + "\n")
    print(f"\nwritten: {path} and {path.with_suffix('.json')}")
