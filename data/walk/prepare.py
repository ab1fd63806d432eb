"""A third embedded task: walks. Every line of a response is of one kind, so its prefix is a sample of the whole.

A prompt is a ring of rules in shuffled order, some rules that lead nowhere, a start and a limit:

    Hal=Eve-4
    Zed=Ivy+5
    Dan=Hal+6
    Eve=Dan+1
    Dan=14 18?

From Dan at 14, Dan's rule leads to Hal and adds 6, Hal's to Eve and takes away 4, and so on round and round, until a
value reaches the limit:

    Dan=Hal+6=14+6=20
    #### 20

Here it took one line; a walk takes 4 to 24. Unlike a response of data/chains, which plans first and computes later, a
walk does the same thing in its first line and in its last.

Ways of answering:
    careful     a line in fifty has a slip in the result, and is written once more at once, right;
    careless    a line in ten has a slip, which all later lines inherit;
    hasty       adds what should be taken away; and slips as well, a line in twenty at most.

`python data/walk/prepare.py` writes train.jsonl and test.jsonl. `--sft` also writes the text the pair was trained on:
for the teacher sft_careful.jsonl and then sft_clean.jsonl, the same without slips; for the student sft_mixed.jsonl (20%
careful, 20% careless, 60% hasty). A problem belongs to the test set if and only if a hash of its arithmetic (start,
limit and steps, whatever the names and the order of the rules) falls in one sixteenth of the hash's range.
"""

import argparse
import hashlib
import itertools
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data.chains.prepare import NAMES, compute_line, line_text, write_jsonl

HERE = Path(__file__).resolve().parent
SHORTEST, LONGEST = 4, 24  # lines of a walk


def make_problem(rng: random.Random) -> dict:
    """Draw one problem: {"rules": {name: (next, step)} in prompt order, "walk": [(name, next, step, value before)],
    "start": (name, value), "limit": int}. Every value lies in 0..99."""
    length = rng.randint(SHORTEST, LONGEST)
    while True:
        names = rng.sample(NAMES, rng.randint(3, 6) + rng.randint(2, 3))
        ring = names[: rng.randint(3, min(6, len(names) - 2))]
        others = names[len(ring) :]
        steps = [rng.randint(1, 9) * rng.choice((1, 1, 1, -1, -1)) for _ in ring]
        value = start = rng.randint(5, 30)
        highest, walk = start, []
        for i in range(length):
            highest = max(highest, value)
            walk.append((ring[i % len(ring)], ring[(i + 1) % len(ring)], steps[i % len(ring)], value))
            value += steps[i % len(ring)]
            if not 0 <= value <= 99:
                break
        # The last line is the first to get above all others; at least one that was walked subtracts.
        if len(walk) == length and 99 >= value > highest and any(step < 0 for _, _, step, _ in walk):
            break
    rules = {ring[i]: (ring[(i + 1) % len(ring)], step) for i, step in enumerate(steps)}
    for name, ref in itertools.pairwise(others):  # rules that the ring never comes to
        rules[name] = (ref, rng.randint(1, 9) * rng.choice((1, -1)))
    order = rng.sample(list(rules), len(rules))
    return {"rules": {n: rules[n] for n in order}, "walk": walk, "start": (ring[0], start),
            "limit": rng.randint(highest + 1, value)}


def prompt_text(problem: dict) -> str:
    rules = "".join(line_text(name, *rule) + "\n" for name, rule in problem["rules"].items())
    return f"{rules}{problem['start'][0]}={problem['start'][1]} {problem['limit']}?\n"


def respond(
    problem: dict, rng: random.Random, slip: float = 0.0, mend: bool = True, subtract: bool = True
) -> tuple[str, int]:
    """A response and its answer. slip: probability a line of a wrong result (half of them a step with the wrong sign);
    mend: whether a wrong line is written once more, right; subtract: False for the hasty way."""
    name, value = problem["start"]
    out: list[str] = []
    while value < problem["limit"] and len(out) < 3 * LONGEST:
        (ref, step), operand = problem["rules"][name], value
        right = min(max(operand + (step if subtract else abs(step)), 0), 99)
        value = right
        if rng.random() < slip:
            value = operand - step if rng.random() < 0.5 else right + rng.randint(1, 9) * rng.choice((1, -1))
            value = min(max(value, 0), 99)
        out.append(compute_line(name, ref, step, operand, value))
        if mend and value != right:
            value = right
            out.append(compute_line(name, ref, step, operand, value))
        name = ref
    return "\n".join(out + [f"#### {value}"]), value


def is_test(problem: dict) -> bool:
    arithmetic = problem["start"][1], problem["limit"], [step for _, _, step, _ in problem["walk"]]
    return hashlib.sha256(str(arithmetic).encode()).digest()[0] < 16


def make_rows(count: int, seed: str, test: bool, mix: tuple[float, float, float], slip: float = 0.02) -> list[dict]:
    """`count` rows {"prompt", "answer", "solution"} of distinct prompts; `mix` = shares of careful, careless, hasty
    text, `slip` the careful way's."""
    rng = random.Random(f"walk {seed}")
    rows, seen = [], set()
    while len(rows) < count:
        problem = make_problem(rng)
        prompt = prompt_text(problem)
        if is_test(problem) != test or prompt in seen:
            continue
        seen.add(prompt)
        answer = respond(problem, rng)[1]
        way = rng.choices(("careful", "careless", "hasty"), mix)[0]
        if way == "careful":
            solution = respond(problem, rng, slip)[0]
        elif way == "careless":
            solution = respond(problem, rng, 0.1, mend=False)[0]
        else:
            solution = respond(problem, rng, 0.05, mend=False, subtract=False)[0]
        rows.append({"prompt": prompt, "answer": str(answer), "solution": solution})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sft", action="store_true", help="also write the supervised text of the pair (70 MB)")
    args = parser.parse_args()
    train = make_rows(8000, "train", False, (1.0, 0.0, 0.0), slip=0.0)
    test = make_rows(1000, "test", True, (1.0, 0.0, 0.0), slip=0.0)
    assert not {r["prompt"] for r in train} & {r["prompt"] for r in test}
    write_jsonl(HERE / "train.jsonl", train)
    write_jsonl(HERE / "test.jsonl", test)
    if args.sft:
        write_jsonl(HERE / "sft_careful.jsonl", make_rows(60_000, "careful", False, (1.0, 0.0, 0.0)))
        write_jsonl(HERE / "sft_clean.jsonl", make_rows(60_000, "clean", False, (1.0, 0.0, 0.0), slip=0.0))
        write_jsonl(HERE / "sft_mixed.jsonl", make_rows(60_000, "mixed", False, (0.2, 0.2, 0.6)))


if __name__ == "__main__":
    main()
