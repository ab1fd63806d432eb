"""What a model does at a wall, and how often it slips, counted in its responses.

    python eval.py --model out/step_000020 --temperature 1 --max_new_tokens 1024 --out x.json
    python data/hops/walls.py x.jsonl ...
"""

import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from data.hops.prepare import line

LINE = re.compile(r"<?(\d+)/\d+ ([abAB])(.*)")


def read_problem(prompt: str) -> dict:
    """As make_problem makes it, without what is right; of the teacher's prompt, too."""
    (a, b, wall, score), *starts = ([int(x) for x in re.findall(r"\d+", text)] for text in prompt.splitlines())
    return {"hops": (a, b), "wall": wall, "score": score, "starts": dict(starts)}


def count(prompt: str, response: str) -> dict[str, int]:
    """Of a careful response: lines; lines with a slip, which no careful text has; stages begun, and with the right
    hop; walls behind a first hop, and after how many of them the other one was tried; answers that are not the
    score written last."""
    problem = read_problem(prompt)
    keys = ("lines", "slips", "begun", "right", "walls", "again", "answers_wrong")
    found, lines, score = dict.fromkeys(keys, 0), response.split("\n"), problem["score"]
    lines, answer = lines[1:-1], lines[-1]
    for text, following in zip(lines, [*lines[1:], ""]):
        found["lines"] += 1
        parts = LINE.fullmatch(text)
        if not parts or int(parts[1]) not in problem["starts"]:
            found["slips"] += 1
            continue
        number, letter, rest = parts.groups()
        true_start, true_line = problem["starts"][int(number)], line(problem, int(number), letter, score)[1]
        true = f"{'<' * (letter in 'AB')}{number}/{true_start} {letter}{true_line}"
        found["slips"] += text + "\n" != true
        if letter in "ab":
            found["begun"] += 1
            found["right"] += "x" not in true_line
            if rest.endswith("x"):
                found["walls"] += 1
                found["again"] += following.startswith("<")
        if written := re.search(r"=(\d+)$", rest):
            score = int(written[1])
    found["answers_wrong"] += answer != f"####={score}"
    return found


def main() -> None:
    for path in sys.argv[1:]:
        with open(path, encoding="utf-8") as f:
            records = [json.loads(text) for text in f if '"response"' in text]
        if not records:
            print(f"{path}: no responses in it; they are in the .jsonl that eval.py writes beside its .json")
            continue
        careful = [r for r in records if r["response"].startswith(" +")]
        found = [count(r["prompt"], r["response"]) for r in careful]
        n = {key: sum(f[key] for f in found) for key in found[0]} if found else {}
        print(f"{path}: {len(records)} responses, careful {len(careful) / len(records):.2f}")
        if n:
            of = {"again": "walls", "right": "begun", "slips": "lines"}
            again, right, slips = (n[part] / max(1, n[whole]) for part, whole in of.items())
            print(f"  the other hop tried after {again:.3f} of {n['walls']} walls; first hop right {right:.3f} of "
                  f"{n['begun']}; slips in {slips:.4f} of {n['lines']} lines; answers other than the score "
                  f"{n['answers_wrong']}")


if __name__ == "__main__":
    main()
