"""Problems of `hops`: hop round a ring of 100 numbers until a gate or a wall, and turn back where it was a wall.

    python data/hops/prepare.py               # train.jsonl and test.jsonl again, byte for byte
    python data/hops/prepare.py --sft         # also supervised text: for the two checkpoints, and for comparisons
    python data/hops/prepare.py --tokenizer   # also the tokenizer and the two configurations

A gate is a multiple of 20. A prompt names two hops, the digit in which walls end, a score and a start for each stage; a
response goes through the stages and keeps the score:

    a+7b+13x5=12             two hops; walls are 5, 15, 25, ...; the score at the beginning
    8/14                     stage 8: from 14, is a gate before a wall by hops of 7, or by hops of 13?
    9/19
     +                       the plan: careful. Hasty, ` -`, is to choose without hopping, and to guess
    8/14 a+7 21 28 35x       by hops of 7 a wall, so not a
    <8/14 B+13 27 40=14      <: back; the other hop, in capitals: a gate, whose 2 points are added
    9/19 a+7 26 33 40=16
    ####=16                  the answer: the score at the end

Which hop is right takes the hops to see, or the memory of a start that was the same modulo 20. The teacher need not
try: it is shown the right one behind each start (`teacher_prompt` of the rows), so in its own text hardly a try ends at
a wall. The student is not shown it and has to try; and what to do at a wall is seen only in text that it writes.
"""

import argparse
import functools
import hashlib
import json
import random
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

from data.embedded import write_jsonl, write_pair

RING, GATE = 100, 20  # numbers; gates are multiples of this
SCORES = 30  # the score is counted modulo this
STAGES = 24  # of a problem
NUMBERS = 40  # stages are numbered round a ring too, from anywhere on, so that prefixes meet every number
HOPS = 7, 13, 17, 23, 29, 31, 37, 41  # each visits the whole ring
# What the student does, with its probability: is hasty; takes the wrong hop first, since it does not know; goes on to
# the next stage where a try has ended at a wall.
HABITS = {"hasty": 0.65, "wrong": 0.5, "leave": 0.1}
UNSURE = {"hasty": 0, "wrong": 0.01, "leave": 0}  # the teacher; if it were surer, every guess would cost too much


@functools.cache
def hop(start: int, by: int, wall: int) -> list[int]:
    """The numbers, up to the first gate or wall."""
    path = [(start + by) % RING]
    while path[-1] % GATE and path[-1] % 10 != wall:
        path.append((path[-1] + by) % RING)
    return path


def points(end: int) -> int:
    """1 to 5 of a gate, nothing of a wall."""
    return 0 if end % GATE else end // GATE or 5


def make_problem(rng: random.Random, stages: int, test: bool = False) -> dict:
    """{"hops": (a, b), "wall": the digit, "score": at the beginning, "starts": {number: start}, "right": {number: 0 for
    a, 1 for b}}"""
    first = rng.randrange(NUMBERS)
    numbers = [(first + k) % NUMBERS + 1 for k in range(stages)]
    while True:
        problem = {"hops": rng.sample(HOPS, 2), "wall": rng.randint(1, 9), "score": rng.randrange(SCORES), "starts": {}}
        problem["right"] = dict(zip(numbers, rng.choices((0, 1), k=stages)))  # nothing but hopping tells which
        starts = [], []  # those from which only a, only b, reaches a gate
        for start in rng.sample(range(RING), RING):
            at_gate = [points(hop(start, by, problem["wall"])[-1]) > 0 for by in problem["hops"]]
            if at_gate[0] != at_gate[1] and start % GATE and start % 10 != problem["wall"]:
                starts[at_gate[1]].append(start)
        if any(list(problem["right"].values()).count(letter) > len(starts[letter]) for letter in (0, 1)):
            continue  # too few of one kind
        problem["starts"] = {i: starts[problem["right"][i]].pop() for i in numbers}
        if (hashlib.sha256(json.dumps(problem).encode()).digest()[0] < 16) == test:
            return problem


def prompt_text(problem: dict, shown: bool = False) -> str:
    """shown: with the right hop behind each start."""
    a, b = problem["hops"]
    letters = {i: f" {'ab'[right]}" for i, right in problem["right"].items()} if shown else {}
    return f"a+{a}b+{b}x{problem['wall']}={problem['score']}\n" + "".join(
        f"{i}/{start}{letters.get(i, '')}\n" for i, start in problem["starts"].items())


def line(problem: dict, number: int, letter: str, score: int) -> tuple[int, str]:
    """(the score behind it, the line from the hop on)"""
    by = problem["hops"]["ab".index(letter.lower())]
    path = hop(problem["starts"][number], by, problem["wall"])
    got = points(path[-1])
    score = (score + got) % SCORES
    return score, f"+{by}" + "".join(f" {x}" for x in path) + (f"={score}\n" if got else "x\n")


def write(
    problem: dict, rng: random.Random | None = None, habits: dict | None = None, until: int = 10**6,
    then: dict | None = None,
) -> tuple[str, int]:
    """(response, characters up to the last choice made by habit): all right, or with the first `until` choices made by
    `habits` and the others by `then`."""
    text, made, cut, score = "", 0, 0, problem["score"]
    numbers = [*problem["starts"], "####"]

    def choose(habit: str) -> bool:
        """Whether to do what is right."""
        nonlocal made
        made += 1
        now = habits if made <= until else then
        return now is None or rng.random() >= now[habit]

    def add(more: str) -> None:
        """Write what was chosen."""
        nonlocal text, cut
        text += more
        cut = len(text) if habits is not None and made <= until else cut

    careful = choose("hasty")
    add(" +\n" if careful else " -\n")
    for k, (i, start) in enumerate(problem["starts"].items()):
        text += f"{i}/{start}" if text.endswith("\n") else f"/{start}"  # the number stands there if a stage was left
        option = problem["right"][i] if choose("wrong") else 1 - problem["right"][i]
        add(f" {'ab'[option]}")
        if not careful:
            text += "\n"
            continue
        score, rest = line(problem, i, "ab"[option], score)
        text += rest
        if rest.endswith("x\n"):
            again = choose("leave")
            add("<" if again else f"{numbers[k + 1]}")
            if again:
                score, rest = line(problem, i, "AB"[1 - option], score)
                text += f"{i}/{start} {'AB'[1 - option]}{rest}"
    score = score if careful else rng.randrange(SCORES)
    return text + ("" if text.endswith("####") else "####") + f"={score}", cut


def make_rows(
    wanted: int, seed: str, stages: tuple[int, int] = (STAGES, STAGES), *, habits: dict | None = None,
    then: dict | None = None, shown: bool = False, solutions: bool = True,
) -> list[dict]:
    """Rows {"prompt", "shown", "teacher_prompt", "answer", "solution"}, the solution only where `solutions`: all right,
    or by `habits`. With `shown` the prompt is what the teacher reads; half of the rows go on from a beginning by
    `habits`, which stands in the prompt, where nothing is learnt, and all by `then`. stages: the fewest and the most.
    """
    rng, rows = random.Random(seed), []
    for _ in range(wanted):
        n = rng.randint(*stages)
        problem = make_problem(rng, n, test=seed == "test")
        row = {"prompt": prompt_text(problem), "shown": prompt_text(problem, shown=True), "teacher_prompt": "{shown}",
               "answer": write(problem)[0].split("####")[1]}
        if shown:
            text, cut = write(problem, rng, habits, rng.randint(1, 2 * n) if rng.random() < 0.5 else 0, then)
            row |= {"prompt": row["shown"] + text[:cut], "solution": text[cut:]}
        elif solutions:
            row["solution"], _ = write(problem, rng, habits)
        rows.append(row)
    return rows


def write_tokenizer() -> None:
    """A number of the ring is one token with the mark before it, a hop with its +, a score with its =."""
    words = [f"{mark}{x}" for x in range(RING) for mark in " /"] + [f"+{x}" for x in HOPS]
    words += [f"={x}" for x in range(SCORES)] + [f"{i}" for i in range(1, NUMBERS + 1)]
    words = words * 9 + [" a", " b", " A", " B", " +", " -", "####"] * 90  # the frequent ones are merged first
    write_pair(HERE, r"[ /+=]?\d+| [abAB+-]|#+|\n|.", words, rope_theta=1e4, teacher=64, student=64, layers=3,
               kv_heads=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sft", action="store_true", help="also supervised text (64 MB)")
    parser.add_argument("--tokenizer", action="store_true", help="also the tokenizer and the configurations")
    args = parser.parse_args()
    train, test = make_rows(1000, "train", solutions=False), make_rows(500, "test", solutions=False)
    write_jsonl(HERE / "train.jsonl", train)
    write_jsonl(HERE / "test.jsonl", test)
    if args.tokenizer:
        write_tokenizer()
    if args.sft:
        clean = make_rows(2000, "clean")  # text without walls, to compare with
        write_jsonl(HERE / "few.jsonl", train[:8])
        write_jsonl(HERE / "shown.jsonl", [row | {"prompt": row["shown"]} for row in test])
        write_jsonl(HERE / "sft_few.jsonl", clean[:8])
        write_jsonl(HERE / "sft_clean.jsonl", clean)
        persistent = {"hasty": 0, "wrong": 0.5, "leave": 0}  # has walls in it, and the way back from them
        write_jsonl(HERE / "sft_recovered.jsonl", make_rows(2000, "recovered", habits=persistent))
        patient = HABITS | {"hasty": 0.4}

        def lesson(name: str, alone: int, shown: int, fewest: int, most: int, habits: dict, **how) -> None:
            how |= {"stages": (fewest, most), "habits": habits}
            write_jsonl(HERE / f"sft_{name}.jsonl", make_rows(alone, name, **how)
                        + make_rows(shown, f"{name} shown", shown=True, **how))

        lesson("short", 16_000, 16_000, 2, 6, patient)
        lesson("mixed", 12_000, 12_000, 2, STAGES, patient)
        lesson("full", 10_000, 10_000, STAGES, STAGES, patient)
        lesson("student", 4_000, 0, STAGES, STAGES, HABITS)
        lesson("teacher", 0, 10_000, STAGES, STAGES, patient, then=UNSURE)


if __name__ == "__main__":
    main()
