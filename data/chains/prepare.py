"""A small embedded task: chains of definitions, learnt in minutes on two CPU cores and long enough to have a prefix.

A prompt is a small graph of definitions in shuffled order, some of them distractors, and a question:

    Zed=Ivy+5
    Dan=Hal-8
    Ivy=31
    Hal=Eve+3
    Eve=14
    Dan?

A *careful* response first plans backwards from the question, restating the lines it needs until it reaches a number,
then computes forwards, a line a step, and states the answer:

    Dan=Hal-8
    Hal=Eve+3
    Eve=14
    Hal=Eve+3=14+3=17
    Dan=Hal-8=17-8=9
    #### 9

Two worse ways of answering exist, for the student to have read:
    careless    the same plan with lines dropped now and then, and slips in the results, which all later lines inherit;
    sloppy      no plan: grabs the first number of the prompt, follows whatever uses it, and at the end forces the
                question's own line onto the value in hand.

`python data/chains/prepare.py` writes train.jsonl and test.jsonl (they are committed; running it again changes
nothing). `--sft` also writes the text the pair was trained on (not committed): sft_short.jsonl, sft_careful.jsonl,
sft_mixed.jsonl. `--tokenizer` trains the tokenizer and writes it, with the model configurations, into teacher/ and
student/.

No problem of the test set is in training, by construction: a problem belongs to the test set if and only if a hash of
its *arithmetic* (the first number and the operations along the chain, in order, whatever the names, the distractors and
the order of the lines) falls in one sixteenth of the hash's range. `main` checks it again on what it wrote.
"""

import argparse
import hashlib
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data.embedded import write_jsonl, write_pair

HERE = Path(__file__).resolve().parent
NAMES = [
    "Amy", "Bob", "Cat", "Dan", "Eve", "Fay", "Guy", "Hal", "Ivy", "Jim", "Kit", "Leo", "Mia",
    "Ned", "Oli", "Pam", "Quy", "Ray", "Sue", "Tom", "Uma", "Val", "Wes", "Xia", "Yan", "Zed",
]
MAX_CHAIN = 11  # definitions between the question and a number, both ends counted


def make_problem(rng: random.Random, longest: int = MAX_CHAIN, distractors: tuple[int, int] = (2, 4)) -> dict:
    """Draw one problem: {"lines": {name: (ref or None, signed constant)} in prompt order, "question": name}.

    A line is `name=constant` (ref None) or `name=ref+constant` / `name=ref-constant`. Every value lies in 0..99.
    """
    chain_length = rng.randint(2, longest)
    names = rng.sample(NAMES, chain_length + rng.randint(*distractors))
    value = {names[0]: rng.randint(10, 40)}
    lines = {names[0]: (None, value[names[0]])}
    for i, name in enumerate(names[1:], start=1):
        if i >= chain_length and rng.random() < 0.4:  # a distractor that starts a chain of its own
            value[name] = rng.randint(10, 40)
            lines[name] = (None, value[name])
            continue
        # A chain's line refers to the one before; a distractor to the question's line or to another distractor, so that
        # among the chain's own definitions each is mentioned by one line only.
        ref = names[i - 1] if i < chain_length else rng.choice(names[chain_length - 1 : i])
        step = rng.randint(1, 9) * rng.choice((1, -1))
        if not 0 <= value[ref] + step <= 99:
            step = -step
        value[name] = value[ref] + step
        lines[name] = (ref, step)
    order = rng.sample(list(lines), len(lines))
    return {"lines": {name: lines[name] for name in order}, "question": names[chain_length - 1]}


def line_text(name: str, ref: str | None, step: int) -> str:
    return f"{name}={step}" if ref is None else f"{name}={ref}{step:+d}"


def prompt_text(problem: dict) -> str:
    definitions = "".join(line_text(name, *line) + "\n" for name, line in problem["lines"].items())
    return f"{definitions}{problem['question']}?\n"


def chain_of(problem: dict) -> list[str]:
    """The names from the question down to the number it rests on."""
    chain = [problem["question"]]
    while (ref := problem["lines"][chain[-1]][0]) is not None:
        chain.append(ref)
    return chain


def compute_line(name: str, ref: str, step: int, operand: int, result: int) -> str:
    return f"{name}={ref}{step:+d}={operand}{step:+d}={result}"


def careful(problem: dict, rng: random.Random, slip: float = 0.0, drop: float = 0.0) -> tuple[str, int]:
    """The careful response and its answer; with `slip` > 0 or `drop` > 0 (probabilities a line) the careless one."""
    lines = problem["lines"]
    chain = chain_of(problem)
    # Dropped lines are never planned, hence never computed. The question's own line and the number always stand.
    chain = [n for i, n in enumerate(chain) if i in (0, len(chain) - 1) or rng.random() >= drop]
    out = [line_text(name, *lines[name]) for name in chain]
    value = lines[chain[-1]][1]
    for name in reversed(chain[:-1]):
        ref, step = lines[name]
        result = value + step
        if rng.random() < slip:
            result += rng.randint(1, 9) * rng.choice((1, -1))
        result = min(max(result, 0), 99)
        out.append(compute_line(name, ref, step, value, result))
        value = result
    return "\n".join(out + [f"#### {value}"]), value


def sloppy(problem: dict, rng: random.Random) -> tuple[str, int]:
    """The response that starts from the first number in sight, without a plan. Now and then it is right."""
    lines, question = problem["lines"], problem["question"]
    name = next(n for n, (ref, _) in lines.items() if ref is None)
    value = lines[name][1]
    out = [line_text(name, *lines[name])]
    for _ in range(rng.randint(1, 3)):
        follower = next((n for n, (ref, _) in lines.items() if ref == name), None)
        if name == question or follower is None:
            break
        ref, step = lines[follower]
        result = min(max(value + step, 0), 99)
        out.append(compute_line(follower, ref, step, value, result))
        name, value = follower, result
    if name != question:  # force the question's line onto the value in hand
        ref, step = lines[question]
        result = min(max(value + step, 0), 99)
        out.append(compute_line(question, ref, step, value, result))
        value = result
    return "\n".join(out + [f"#### {value}"]), value


def is_test(problem: dict) -> bool:
    steps = [problem["lines"][name][1] for name in reversed(chain_of(problem))]
    return hashlib.sha256(str(steps).encode()).digest()[0] < 16


def make_rows(
    count: int, seed: str, test: bool, mix: tuple[float, float, float] = (1.0, 0.0, 0.0), short: bool = False
) -> list[dict]:
    """`count` rows {"prompt", "answer", "solution"} of distinct prompts; `mix` = shares of careful, careless, sloppy
    text.

    short: chains of at most 4 definitions and at most 2 distractors, a first lesson in looking up a line.
    """
    rng = random.Random(seed)
    rows, seen = [], set()
    while len(rows) < count:
        problem = make_problem(rng, 4, (1, 2)) if short else make_problem(rng)
        prompt = prompt_text(problem)
        if is_test(problem) != test or prompt in seen:
            continue
        seen.add(prompt)
        answer = careful(problem, rng)[1]
        way = rng.choices(("careful", "careless", "sloppy"), mix)[0]
        if way == "careful":
            solution = careful(problem, rng)[0]
        elif way == "careless":
            solution = careful(problem, rng, slip=0.15, drop=0.1)[0]
        else:
            solution = sloppy(problem, rng)[0]
        rows.append({"prompt": prompt, "answer": str(answer), "solution": solution})
    return rows


def train_tokenizer(rows: list[dict], folder: Path = HERE) -> None:
    """A byte-level BPE with a split pattern close to Llama 3's, in which a sign goes with the word or number after it:
    `Dan` (a line's own name), `=Dan` (a mention of it), `-8` and `=14` are one token each."""
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|[^\r\n\p{L}\p{N}]?\p{N}{1,2}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    # Every name in every role and every number at least once, so that the vocabulary does not hang on chance.
    every = [f"{n}={m}+1=2\n{n}?\n" for n in NAMES for m in NAMES] + [
        f"{i}={i} {i}+{i % 10}-{i % 10}" for i in range(100)
    ]
    write_pair(folder, pattern, every * 3 + [r["prompt"] + r["solution"] for r in rows], rope_theta=10000.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sft", action="store_true", help="also write the supervised text of the pair (450,000 rows, 110 MB)"
    )
    parser.add_argument(
        "--tokenizer", action="store_true", help="train the tokenizer and write it with the configurations"
    )
    args = parser.parse_args()
    train, test = make_rows(8000, "train", test=False), make_rows(1000, "test", test=True)
    assert not {r["prompt"] for r in train} & {r["prompt"] for r in test}
    write_jsonl(HERE / "train.jsonl", train)
    write_jsonl(HERE / "test.jsonl", test)
    if args.sft:
        write_jsonl(HERE / "sft_short.jsonl", make_rows(50_000, "short", test=False, short=True))
        write_jsonl(HERE / "sft_careful.jsonl", make_rows(200_000, "careful", test=False))
        write_jsonl(HERE / "sft_mixed.jsonl", make_rows(200_000, "mixed", test=False, mix=(0.2, 0.2, 0.6)))
    if args.tokenizer:
        train_tokenizer(train)


if __name__ == "__main__":
    main()
