"""Pictures, from logs and JSON numbers alone, and the comparison of any number of runs (`python eval.py runs`)."""

import itertools
import json
import re
import textwrap
import zlib
from pathlib import Path

from data import InputError, read_json, reading
from data.run import MAY_CHANGE, read_log

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9", "#999999")  # Okabe and Ito's


def panels(titles: list[str], x_label: str, x_scale: str = "linear"):
    """A figure with a panel for each title, side by side, and the panels; three are 1,560 pixels wide."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    rcParams["text.parse_math"] = False  # a "$" in a path is no mathematics
    figure = Figure((4 * len(titles) if len(titles) > 1 else 9, 3.6), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1)
    grid = figure.subplots(1, len(titles), squeeze=False)[0]
    for panel, title in zip(grid, titles):
        panel.set_title(title, fontsize=10, loc="left")
        panel.set(xlabel=x_label, xscale=x_scale)
        panel.xaxis.set_major_formatter(number := EngFormatter())  # 1 k, 1 M, ...
        panel.xaxis.set_minor_formatter(lambda x, _, number=number, axis=panel.xaxis: number(x) if (
            f"{x:e}"[0] in "25" and axis.get_view_interval()[1] < 200 * axis.get_view_interval()[0]) else "")
        panel.tick_params("x", which="minor", pad=5)  # their ticks are shorter
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    return figure, grid


def log_scale(panel) -> None:
    """A logarithmic y axis in plain numbers, five decades at most: what lies below them is as good as nothing."""
    panel.set_yscale("log")
    low, high = panel.get_ylim()
    panel.set_ylim(max(low, high / 1e5), high)
    panel.yaxis.set_major_formatter("{x:g}")
    if high < 200 * low:  # then powers of ten are few: 0.2 and 0.5 too
        panel.yaxis.set_minor_formatter(lambda y, _: f"{y:g}" if f"{y:e}"[0] in "25" else "")


def name_lines(figure, grid, names: list[str]) -> None:
    """Name the first lines of every panel where they end, moved apart so that no two names overlap; in one legend
    below if the names are many or long. Of paths, the last two parts are shown if they differ."""
    short = [re.sub(r"\S*/(?=[^\s/]+/[^\s/]+)", "", name) for name in names]
    names = short if len(set(short)) == len(names) else names
    longest = max(len(line) for name in names for line in name.split("\n"))
    if len(names) > len(COLORS) or longest * len(grid) > 48:
        wide = int(12.5 * figure.get_figwidth())  # 12.5 letters of this size fill an inch; a line's sample takes 8
        columns = max(1, min(len(names), 4, wide // (longest + 8)))
        figure.legend(grid[0].get_lines()[: len(names)], names, loc="outside lower center", ncols=columns, fontsize=9)
        return
    from matplotlib.patheffects import withStroke

    halo = [withStroke(linewidth=3, foreground="white")]  # a name can be read where another line passes behind it
    for panel in grid:
        labels = [panel.annotate(
            name, (line.get_xdata()[-1], line.get_ydata()[-1]), (7, 0), textcoords="offset points", va="center",
            color=line.get_color(), fontsize=9, annotation_clip=False, path_effects=halo)
            for name, line in zip(names, panel.get_lines())]
        figure.draw_without_rendering()
        boxes, up = [label.get_window_extent() for label in labels], [0.0] * len(labels)
        for _, (i, j) in itertools.product(range(200), itertools.permutations(range(len(labels)), 2)):
            a, b, gap = boxes[i], boxes[j], boxes[j].y0 + up[j] - boxes[i].y1 - up[i]
            if -a.height <= gap < 0 and a.x0 < b.x1 and b.x0 < a.x1:  # i is the lower one
                up[i], up[j] = up[i] + gap / 2, up[j] - gap / 2
        for label, y in zip(labels, up):
            label.set_position((7, y * 72 / figure.dpi))


def draw_diagnostic(kind: str, numbers: dict, out: str) -> None:
    """The picture of a diagnostic of eval.py, its numbers beside it as .json."""
    path = Path(out or f"{kind}.{'html' if kind == 'tokens' else 'png'}")
    path.with_suffix(".json").write_text(json.dumps(numbers, indent=1) + "\n")
    if kind == "tokens":
        template = (Path(__file__).parent / "tokens.html").read_text(encoding="utf-8")
        text = json.dumps(numbers).replace("<", "\\u003c")  # without a "<", no text can end the script that holds it
        path.write_text(template.replace("__NUMBERS__", text), encoding="utf-8")
    else:
        (draw_positions if kind == "positions" else draw_teacher_prefix)(**numbers).savefig(path, dpi=130)
    print(f"written: {path} and {path.with_suffix('.json')}")


def draw_positions(config: dict, curves: dict):
    shown = {"reverse KL, nats": ["kl"], "top-1 agreement": ["agree"],
             "entropy, nats (dashed: the teacher's)": ["student_entropy", "teacher_entropy"]}
    figure, grid = panels(list(shown), "response position (1 is the first token)", "log")
    for panel, keys in zip(grid, shown.values()):
        for key, (number, curve) in itertools.product(keys, enumerate(curves.values())):
            x, y, half, color = curve["position"], curve[key], curve[f"{key}_half_width"], COLORS[number % 8]
            panel.plot(x, y, "--" if key == "teacher_entropy" else "-", color=color, marker="o", markersize=2.5)
            low = [max(a - h, a / 3) for a, h in zip(y, half)]  # a logarithm needs > 0
            high = [min(a + h, 1) if key == "agree" else a + h for a, h in zip(y, half)]
            panel.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
        if keys != ["agree"]:
            log_scale(panel)
    name_lines(figure, grid, list(curves))
    figure.suptitle(f"Student against teacher along its responses ({config['data']}); bands: 95%", fontsize=11)
    return figure


def draw_teacher_prefix(config: dict, curves: dict):
    title = f"accuracy on {config['data']} at temperature {config['temperature']:g} (bands: 95%)"
    figure, grid = panels([title], "tokens of the teacher's that the student goes on from")
    for number, points in enumerate(curves.values()):
        x, color = range(len(points)), COLORS[number % 8]
        grid[0].plot(x, [p["accuracy"] for p in points], marker="o", markersize=4, color=color)
        grid[0].fill_between(x, [p["low"] for p in points], [p["high"] for p in points], color=color, alpha=0.15)
        grid[0].set_xticks(x, [str(p["k"]) for p in points])
    name_lines(figure, grid, list(curves))
    return figure


# --- any number of runs

METRICS = {"accuracy": "accuracy, sampled", "kl": "held-out KL, nats per token"}
NOT_COMPARED = MAY_CHANGE - {"steps"} | {"seed"}


def read_run(folder: Path) -> dict:
    """{"folder": its name, "config", "points": [{step, flop, tokens, seconds, and the metrics evaluated there}]}."""
    if not (folder / "log.jsonl").is_file():
        raise InputError(f"{folder}: no log.jsonl there, so it is no run's folder")
    points, spent = [], {"flop": 0.0, "tokens": 0, "seconds": 0.0}
    with reading(folder / "log.jsonl"):
        for r in read_log(folder / "log.jsonl"):
            if "loss" in r:
                spent = {"flop": spent["flop"] + r["flop_sample"] + r["flop_teacher"] + r["flop_student"],
                         "tokens": spent["tokens"] + r["tokens"],
                         "seconds": spent["seconds"] + r["seconds_sample"] + r["seconds_learn"]}
            else:
                found = {key: r[key] for key in ("accuracy", "finish", "mean_len", "kl") if key in r}
                points.append({"step": r["step"], **spent, **found})
    config = read_json(folder / "config.json")
    if config.get("schedule") == "constant":  # then these mean nothing
        config["prefix_start"] = None
    return {"folder": folder.name, "config": config, "points": points}


def group_runs(folders: list[str]) -> tuple[dict[str, list[dict]], bool]:
    """(runs by name, whether the names are flags and their values). Runs that differ in the seed, and in flags that
    change no result, go together, under the flags that set them apart from the others. Where all folders are called
    NAME_seed1, NAME_seed2, ..., those of one name go together, under that name, so that runs of different code are told
    apart as well."""
    runs, groups = [read_run(Path(f)) for f in folders], {}
    known = dict.fromkeys(k for r in runs for k in r["config"])
    keys = [k for k in known if k not in NOT_COMPARED and len({str(r["config"].get(k) or 0) for r in runs}) > 1]
    names = [", ".join(f"{k} {spell(r['config'][k])}" for k in keys if r["config"].get(k) not in (None, ""))
             or "all runs" for r in runs]
    called = [re.sub(r"(.)_seed\d+$", r"\1", r["folder"]) for r in runs]
    by_folder = all(c != r["folder"] for c, r in zip(called, runs)) and len({*called}) == len({*zip(called, names)})
    if by_folder:
        names = [re.sub(r"_|(?<=[a-z])(?=\d)", " ", c) for c in called]
    for name, run in zip(names, runs):
        groups.setdefault(name, []).append(run)
    number = re.compile(r"\d+(\.\d+)?(e-?\d+)?")
    return {name: groups[name] for name in sorted(groups, key=lambda name: [
        (0, float(w), "") if number.fullmatch(w) else (1, 0.0, w) for w in re.split("[ ,]+", name)])}, not by_folder


def spell(value) -> str:
    """A flag's value as one word, and not a long one; different values stay different."""
    text = re.sub(r"[\s,]+", "_", str(value))
    return text if text == str(value) and len(text) <= 60 else f"{text[:40]}~{zlib.crc32(str(value).encode()):08x}"


def tell_apart(names: list[str]) -> tuple[list[str], list[str]]:
    """Shorter names that still tell the groups apart, and the flags left out."""
    hidden = []
    for flag in reversed(dict.fromkeys(part.split()[0] for name in names for part in name.split(", "))):
        fewer = [", ".join(p for p in name.split(", ") if p.split()[0] != flag) for name in names]
        if all(fewer) and len(set(fewer)) == len(names):
            names, hidden = fewer, [flag, *hidden]
    return names, hidden


def mean_and_range(values: list[float]) -> str:
    spread = f" ({min(values):.3g} to {max(values):.3g})" if len(values) > 1 else ""
    return f"{sum(values) / len(values):.3g}{spread}"


def draw_runs(folders: list[str], out: str, goals: tuple[float, ...] = (0.5, 0.6, 0.75, 0.9)) -> None:
    """Draw accuracies and KL of run folders against FLOP, the mean over seeds with bars from the lowest to the highest;
    print what each reached in the end, and what the first evaluation that reached a goal had cost."""
    groups, by_flags = group_runs(folders)
    metrics = {k: v for k, v in METRICS.items()
               if all(k in p for runs in groups.values() for r in runs for p in r["points"])}
    if not metrics or not all(r["points"] and r["points"][-1]["flop"] for runs in groups.values() for r in runs):
        raise InputError("runs: no metric was evaluated after a step in all of these runs")
    figure, grid = panels(list(metrics.values()), "training FLOP", "log")
    names, hidden = tell_apart(list(groups)) if by_flags else (list(groups), [])
    numbers, wide, several = {}, max(map(len, names)), max(map(len, groups.values()))
    for number, (name, runs) in enumerate(zip(names, groups.values())):
        steps = sorted(set.intersection(*({p["step"] for p in r["points"] if p["flop"]} for r in runs)))
        if not steps:
            raise InputError(f"runs: those of {name} were never evaluated after the same step")
        at = [[next(p for p in r["points"] if p["step"] == s) for r in runs] for s in steps]  # (steps, runs)
        numbers[name] = {"seeds": [r["config"]["seed"] for r in runs], "points": at}
        x, color = [sum(p["flop"] for p in points) / len(runs) for points in at], COLORS[number % 8]
        for panel, key in zip(grid, metrics):
            y = [[p[key] for p in points] for points in at]
            panel.plot(x, [sum(v) / len(v) for v in y], "-o" if number < 8 else "--o", markersize=4, color=color)
            panel.vlines(x, list(map(min, y)), list(map(max, y)), color=color)
        said = [f"{what} {mean_and_range([p[k] for p in at[-1]])}"
                for k, what in {"flop": "FLOP", "seconds": "s", **metrics}.items()]
        print(f"{name:{wide}}  step {steps[-1]}, {'; '.join(said)}")
    flags = {name.split()[0] for name in names}
    one = by_flags and len(flags) == 1 and len(names) > 1 and not any("," in name for name in names)  # the title has it
    before = [r["points"][0] for runs in groups.values() for r in runs if not r["points"][0]["flop"]]
    for panel, key in zip(grid, metrics):  # a logarithmic axis has no place for 0 FLOP
        if len({f"{p[key]:.3g}" for p in before}) == 1:
            panel.axhline(before[0][key], color="gray", linestyle=":", zorder=0)
            panel.annotate("before", (0, before[0][key]), (3, 2), xycoords=("axes fraction", "data"), color="gray",
                           textcoords="offset points", fontsize=9)
    if "kl" in metrics:
        log_scale(grid[-1])
    name_lines(figure, grid, [name.split(maxsplit=1)[1] for name in names] if one else names)
    title = [f"by --{flags.pop()}"] if one else []
    title += [f"mean over seeds (up to {several}), bars: lowest to highest" if several > 1 else "one seed"]
    title += [f"the runs also differ in {', '.join(hidden)}"] if hidden else []
    figure.suptitle(textwrap.fill("; ".join(title).capitalize(), 90), fontsize=11)
    if "accuracy" in metrics:
        print("\nFLOP at the first evaluation with an accuracy of at least ... (the slowest that got there)\n"
              f"{'':{wide}}" + "".join(f"{goal:18}" for goal in goals))
        for name, runs in zip(names, groups.values()):
            reached = [[[p["flop"] for p in r["points"] if p["accuracy"] >= goal] for r in runs] for goal in goals]
            needed = [[flops[0] for flops in by_run if flops] for by_run in reached]
            numbers[name]["flop_to_reach_accuracy"] = dict(zip(map(str, goals), needed))
            print(f"{name:{wide}}" + "".join(
                f"{f'{max(v):.3g} ({len(v)} of {len(runs)})' if v else '-':>18}" for v in needed))
    figure.savefig(out, dpi=130)
    Path(out).with_suffix(".json").write_text(json.dumps(numbers, indent=1) + "\n")
    print(f"\nwritten: {out} and {Path(out).with_suffix('.json')}")
