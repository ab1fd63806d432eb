"""Problems of `hops`: hop round a ring of 100 numbers until a gate or a wall, and turn back where it was a wall.

    python data/hops/prepare.py               # train.jsonl and test.jsonl again, byte for byte
    python data/hops/prepare.py --sft         # also supervised text: for the two checkpoints, and for comparisons
    python data/hops/prepare.py --tokenizer   # also the tokenizer and the two configurations

The gates are 11, 22, 33, ..., 99. A prompt names two hops, the digit in which walls end, a score and a start for each
stage; a response goes through the stages by their numbers and keeps the score:

    a+7b+13x5=12                two hops; walls are 5, 15, 25, ...; the score at the beginning
    8/14                        stage 8: from 14, is a gate before a wall by hops of 7, or by hops of 13?
    10/37                       the first stage stands first and the last one last, the others anywhere
    9/19
    11/64
     +                          the plan: careful. Hasty, ` -`, is to choose without hopping, and to guess
    8/14 a+7 21 28 35x          by hops of 7 a wall, so not a
    <8/14 B+13 27 40 53 66=18   <: back; the other hop, in capitals: a gate, whose 6 points are added
    9/19 a+7 26 33=21
    10/37 a+7 44=25
    11/64 b+13 77=2
    ####=2                      the answer: the score at the end, modulo 30

Which hop is right cannot be seen at a glance, and the stages before hardly tell; it takes the hops. The teacher need
not try: it is shown the right one behind each start (`teacher_prompt` of the rows), so in its own text hardly a try
ends at a wall. The student is not shown it and has to try; and what to do at a wall is seen only in text that it
writes.
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

RING = 100  # numbers
SCORES = 30  # the score is counted modulo this
STAGES = 24  # of a problem
NUMBERS = 40  # stages are numbered round a ring too, from anywhere on, so that prefixes meet every number
HOPS = 7, 13, 17, 23, 29, 31, 37, 41  # each visits the whole ring
# What the student does, with its probability: is hasty; takes the wrong hop first, since it does not know; goes on to
# the next stage where a try has ended at a wall.
HABITS = {"hasty": 0.7, "wrong": 0.5, "leave": 0.1}
UNSURE = {"hasty": 0, "wrong": 0.003, "leave": 0}  # the teacher; if it were surer, every guess would cost too much


@functools.cache
def hop(start: int, by: int, wall: int) -> list[int]:
    """The numbers, up to the first gate or wall."""
    path = [(start + by) % RING]
    while path[-1] % 10 != wall and not points(path[-1], wall):
        path.append((path[-1] + by) % RING)
    return path


def points(end: int, wall: int) -> int:
    """1 to 9 of a gate, nothing of a wall."""
    return 0 if end % 11 or end % 10 == wall else end // 11


def make_problem(rng: random.Random, stages: int, test: bool = False) -> dict:
    """{"hops": (a, b), "wall": the digit, "score": at the beginning, "starts": {number: start} as the prompt has them,
    "right": {number: 0 for a, 1 for b} as the response goes through them}"""
    first = rng.randrange(NUMBERS)
    numbers = [(first + k) % NUMBERS + 1 for k in range(stages)]
    while True:
        problem = {"hops": rng.sample(HOPS, 2), "wall": rng.randint(0, 9), "score": rng.randrange(SCORES), "starts": {}}
        problem["right"] = dict(zip(numbers, rng.choices((0, 1), k=stages)))  # nothing but hopping tells which
        wall, only = problem["wall"], ([], [])  # the starts from which only a, and only b, reaches a gate
        for start in rng.sample(range(RING), RING):
            at_gate = [points(hop(start, by, wall)[-1], wall) > 0 for by in problem["hops"]]
            if at_gate[0] != at_gate[1] and start % 10 != wall and not points(start, wall):
                only[at_gate[1]].append(start)
        # where all starts of one last digit were of one kind, the digit would tell which
        starts = [[s for s in own if s % 10 in {x % 10 for x in other}] for own, other in (only, only[::-1])]
        if any(list(problem["right"].values()).count(letter) > len(starts[letter]) for letter in (0, 1)):
            continue  # too few of one kind
        # mixed up, or a start would be copied from behind the one before, and a wrong one lead to the next
        mixed = [numbers[0], *rng.sample(numbers[1:-1], stages - 2), numbers[-1]]
        problem["starts"] = {i: starts[problem["right"][i]].pop() for i in mixed}
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
    got = points(path[-1], problem["wall"])
    score = (score + got) % SCORES
    return score, f"+{by}" + "".join(f" {x}" for x in path) + (f"={score}\n" if got else "x\n")


def write(
    problem: dict, rng: random.Random | None = None, habits: dict | None = None, until: int = 10**6,
    then: dict | None = None,
) -> tuple[str, int]:
    """(response, characters up to the last choice made by habit): all right, or with the first `until` choices made by
    `habits` and the others by `then`."""
    text, made, cut, score = "", 0, 0, problem["score"]
    numbers = [*problem["right"], "####"]

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
    for k, i in enumerate(problem["right"]):
        start = problem["starts"][i]
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
