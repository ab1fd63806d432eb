"""Problems of `dominoes`: lay chains of dominoes, and turn back where one does not lead to the goal.

    python data/dominoes/prepare.py               # train.jsonl and test.jsonl again, byte for byte
    python data/dominoes/prepare.py --sft         # also supervised text: for the two checkpoints, and for comparisons
    python data/dominoes/prepare.py --tokenizer   # also the tokenizer and the two configurations

A prompt shows dominoes, which form two chains, and asks; a response lays them down:

     bako lihu koli huba re x more      dominoes in any order: from ba to ko, ...; behind re is a wall
    1/mo/hu>ko                          the questions: does mo or does hu lead to ko?
    2/mo/li>re
     +                                  the plan: careful. Hasty, ` -`, answers without laying any
    1/mo/hu1a>ko more re x              the first question, mo; a wall, so not mo
    1B>ko huba bako!                    the other name, in capitals; !: found
    2/mo/li2a>re more!
    ####1b2a                            the answer

Which name is right cannot be seen at a glance, it takes the chain. The teacher need not try: it is shown the answers
before the prompt (the row's `hint`: `--teacher_prompt '{hint}{prompt}'`), so in its own text no chain ever ends at a
wall. The student is not shown them and has to try; and what to do at a wall is seen only in text that it writes.
"""

import argparse
import hashlib
import json
import random
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

from data.embedded import write_jsonl, write_pair

NAMES = [c + v for c in "bcdfghjklmnpqrstvwyz" for v in "aeiou"]
CHAIN, QUESTIONS = 30, 8  # names in each of the two chains; questions
# What the student does, with its probability: answers without trying; takes the wrong name first, since it does not
# know; goes on to the next question where a chain has ended at a wall. The teacher does none of it.
HABITS = {"hasty": 0.65, "wrong": 0.5, "leave": 0.3}


def make_problem(rng: random.Random, chain: int = CHAIN, questions: int = QUESTIONS, test: bool = False) -> dict:
    """{"follows": {name: the next, or " x"}, in prompt order, "questions": [(goal, a, b)], "right": [0 for a, 1 for
    b]}; chain: names of each."""
    while True:
        names = rng.sample(NAMES, 2 * chain)
        chains = names[:chain], names[chain:]
        follows = {a: b for c in chains for a, b in zip(c, [*c[1:], " x"])}
        asked, right = [], []
        for starts in zip(*(rng.sample(range(chain // 2), questions) for _ in chains)):
            order = rng.sample((0, 1), 2)  # which chain each of the two names is of
            right.append(rng.randrange(2))
            which = order[right[-1]]
            goals = chains[which][starts[which] + chain // 4 :]  # at least so far away
            goals = [g for g in goals if g not in [goal for goal, _, _ in asked]] or goals
            asked.append((rng.choice(goals), *(chains[c][starts[c]] for c in order)))
        shown = rng.sample(names, len(names))
        problem = {"follows": {a: follows[a] for a in shown}, "questions": asked, "right": right}
        if (hashlib.sha256(json.dumps(problem).encode()).digest()[0] < 16) == test:
            return problem


def prompt_text(problem: dict) -> str:
    dominoes = "".join(f" {a}{b}" for a, b in problem["follows"].items())
    questions = (f"{i}/{a}/{b}>{goal}\n" for i, (goal, a, b) in enumerate(problem["questions"], 1))
    return f"{dominoes}\n" + "".join(questions)


def hint_text(problem: dict) -> str:
    """What the teacher is shown: how the lines of a right response begin."""
    return "".join(f"{i}/{a}/{b}{i}{'ab'[right]}\n"
                   for i, ((_, a, b), right) in enumerate(zip(problem["questions"], problem["right"]), 1))


def answer_text(problem: dict) -> str:
    return "".join(f"{i}{'ab'[right]}" for i, right in enumerate(problem["right"], 1))


def lay(problem: dict, name: str, goal: str) -> tuple[bool, str]:
    """(whether the chain from `name` leads to `goal`, its line from the goal on)"""
    text = f">{goal}"
    while name not in (goal, " x"):
        text += f" {name}{problem['follows'][name]}"
        name = problem["follows"][name]
    return name == goal, text + ("!\n" if name == goal else "\n")


def write(problem: dict, rng: random.Random | None = None, habits: dict | None = None, until: int = 10**6) -> tuple:
    """(response, characters up to the last choice made by habit): the teacher's response, or one whose first `until`
    choices are made by the student's habits."""
    text, made, cut = "", 0, 0

    def choose(habit: str) -> bool:
        """Whether to do what the teacher does."""
        nonlocal made
        made += 1
        return habits is None or made > until or rng.random() >= habits[habit]

    def add(more: str) -> None:
        """Write what was chosen."""
        nonlocal text, cut
        text += more
        cut = len(text) if habits is not None and made <= until else cut

    careful, answer = choose("hasty"), ""
    add(" +\n" if careful else " -\n")
    for i, (goal, *names) in enumerate(problem["questions"], 1):
        head = f"{i}/{names[0]}/{names[1]}"
        text += head if text.endswith("\n") else head[1:]
        right = problem["right"][i - 1]
        option = right if choose("wrong") else 1 - right
        add(f"{i}{'ab'[option]}")
        if careful:
            found, line = lay(problem, names[option], goal)
            text += line
            if not found:
                again = choose("leave")
                add(f"{i}{'AB'[1 - option]}" if again else f"{i + 1}" if i < len(problem["questions"]) else "####")
                if again:
                    option = 1 - option
                    text += lay(problem, names[option], goal)[1]
        else:
            text += "\n"
        answer += f"{i}{'ab'[option]}"
    return text + ("" if text.endswith("####") else "####") + answer, cut


def make_rows(
    wanted: int, seed: str, *, chain: int = CHAIN, questions: int = QUESTIONS, vary: bool = True,
    habits: dict | None = None, begun: bool = False, solutions: bool = True,
) -> list[dict]:
    """Rows {"hint", "prompt", "answer", "solution"}, the solution only where `solutions`: the teacher's, or by
    `habits`; with `begun`, half of the rows have the teacher go on from a beginning by `habits`, which stands in the
    prompt, where nothing is learnt. vary: chains may be shorter than `chain`."""
    rng, rows = random.Random(seed), []
    for _ in range(wanted):
        names = rng.randint(max(2 * questions, chain // 2), chain) if vary else chain
        problem = make_problem(rng, names, questions, test=seed == "test")
        row = {"hint": hint_text(problem), "prompt": prompt_text(problem), "answer": answer_text(problem)}
        if begun and rng.random() < 0.5:
            text, cut = write(problem, rng, habits, rng.randint(1, 2 * questions))
            row |= {"prompt": row["prompt"] + text[:cut], "solution": text[cut:]}
        elif solutions:
            row["solution"], _ = write(problem, rng, None if begun else habits)
        rows.append(row)
    return rows


def write_tokenizer() -> None:
    """A name is a token of its own, another one behind a space, / and >; so is a question's number with its letter."""
    words = [f"{mark}{name}" for name in NAMES for mark in ("", " ", "/", ">")]
    words += [f"{i}{c}" for i in range(1, 10) for c in "abAB"]
    words = words * 9 + [" x", " +", " -", "####"] * 90  # the frequent ones are merged first
    write_pair(HERE, r"[ />]?[a-z]{2}|\d[abAB]?| [x+-]|#+|\n|.", words, rope_theta=1e4, teacher=64, student=64,
               layers=3, kv_heads=1)


def mixed(name: str, counts: tuple[int, int, int], **options) -> list[dict]:
    """Shuffled rows of problems with two questions, four and eight."""
    sizes = {"chain": 8, "questions": 2}, {"chain": 12, "questions": 4}, {}
    rows = [row for n, size in zip(counts, sizes) for row in make_rows(n, f"{name} {size}", **size, **options)]
    random.Random(name).shuffle(rows)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sft", action="store_true", help="also supervised text (40 MB)")
    parser.add_argument("--tokenizer", action="store_true", help="also the tokenizer and the configurations")
    args = parser.parse_args()
    train = make_rows(2000, "train", vary=False, solutions=False)
    write_jsonl(HERE / "train.jsonl", train)
    test = make_rows(500, "test", vary=False, solutions=False)
    write_jsonl(HERE / "test.jsonl", test)
    if args.tokenizer:
        write_tokenizer()
    if args.sft:
        clean = make_rows(2000, "clean", vary=False)  # the teacher's text, to compare with
        write_jsonl(HERE / "few.jsonl", train[:8])
        write_jsonl(HERE / "hinted.jsonl", [r | {"prompt": r["hint"] + r["prompt"]} for r in test])
        write_jsonl(HERE / "sft_few.jsonl", clean[:8])
        write_jsonl(HERE / "sft_clean.jsonl", clean)
        recovered = make_rows(2000, "recovered", vary=False, habits={"hasty": 0, "wrong": 0.5, "leave": 0})
        write_jsonl(HERE / "sft_recovered.jsonl", recovered)  # with walls, and the way back from them
        patient = HABITS | {"hasty": 0.15}
        write_jsonl(HERE / "sft_both.jsonl", mixed("both", (7000, 6000, 6000), habits=patient))
        write_jsonl(HERE / "sft_student.jsonl", make_rows(6000, "student", habits=HABITS))
        teacher = mixed("teacher", (6000, 6000, 7000), habits=patient, begun=True)
        write_jsonl(HERE / "sft_teacher.jsonl", [r | {"prompt": r["hint"] + r["prompt"]} for r in teacher])


if __name__ == "__main__":
    main()
