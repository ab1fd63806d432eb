"""The table of tests/card.sh and a line of JSON, from the files it left in a folder:  python tests/card.py OUT"""

import contextlib
import json
import sys
from pathlib import Path
from statistics import median


def records(file: Path) -> list[dict]:
    """The JSON objects among the lines of a file."""
    found = []
    for line in file.read_text(errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            found += [json.loads(line)] if line.startswith("{") else []
    return found


def summary(log: list[dict]) -> dict:
    """Of a run's log.jsonl; speeds are medians of its second half, since the first steps compile and allocate."""
    steps, evals = [r for r in log if "loss" in r], [r for r in log if "eval" in r]
    found = {"steps": len(steps), "accuracy": [r["accuracy"] for r in evals if "accuracy" in r],
             "KL to the teacher": [r["kl"] for r in evals if "kl" in r]}
    if steps:
        seconds, late = [r["seconds_sample"] + r["seconds_learn"] for r in steps], len(steps) // 2
        found |= {"loss": [steps[0]["loss"], steps[-1]["loss"]], "seconds of the first step": seconds[0],
                  "seconds per step": median(seconds[late:]),
                  "seconds sampling": median(r["seconds_sample"] for r in steps[late:]),
                  "tokens/s": median(r["tokens_per_s"] for r in steps[late:]),
                  "peak memory, GB": max(r["peak_memory"] for r in steps) / 1e9}
    return found


def main(out: Path) -> None:
    texts = {file.stem: file.read_text(errors="replace").strip() for file in sorted(out.glob("*.txt"))}
    found = {"tests": texts["tests"].split("\n")[-1]} if "tests" in texts else {}
    logs = {file.parent.name: records(file) for file in sorted(out.glob("*/log.jsonl"))}
    found |= {name: summary(log) for name, log in logs.items()}
    steps = {name: [r for r in log if "loss" in r] for name, log in logs.items()}
    if steps.get("plain") and steps.get("resumed"):  # their last step is the same where a run is resumed bit for bit
        one, other = steps["plain"][-1], steps["resumed"][-1]
        found["plain less resumed"] = {key: one[key] - other[key] for key in ("step", "loss", "grad_norm")}
    if "bench" in texts:
        found["bench"] = {key: x for part in records(out / "bench.txt") for key, x in part.items()}
    print(texts.get("versions", ""), texts.get("parts", ""), sep="\n\n")
    for name, x in found.items():
        print(f"\n{name}" + (f": {x}" if isinstance(x, str) else ""))
        for key, value in x.items() if isinstance(x, dict) else ():
            values = value if isinstance(value, list) else [value]
            print(f"  {key:50} " + " -> ".join(f"{v:,.4g}" if isinstance(v, float) else str(v) for v in values))
    print("\n" + json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
