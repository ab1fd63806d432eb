"""Problems of `search`: find the one subset of some numbers that adds up to a target, by depth-first search in writing.

    python data/search/prepare.py               # train.jsonl and test.jsonl again, byte for byte
    python data/search/prepare.py --sft         # also the text that the two checkpoints were trained on (112 MB)
    python data/search/prepare.py --tokenizer   # also the tokenizer and the two configurations

A prompt lists the numbers, the largest first, and the target; a response tries, rejects and backtracks:

    26,18,17,15,10,3,=47            the numbers, then the target
    =47 a26=21 + b18                the target; the stack (depth, number, what remains); the move and the next try
    =47 a26=21 b18=3 + c17
    =47 a26=21 b18=3 c17=x > c15    x: more than what remained
    =47 a26=21 b18=3 c15=x > c10
    =47 a26=21 b18=3 c10=x > c3
    =47 a26=21 b18=3 c3=0           0: found
    #### a26 b18 c3                 the answer

The moves: `+` one deeper, `>` the next number at this depth, `<` one up, since the list is used up. A line follows from
the prompt and the line before it, so line 200 is no harder than line 5, and a response of thousands of tokens is as
learnable as one of a hundred. Where the solution lies decides how long the search is: about 2,000 tokens on average.

The student's text is the same search with faults, drawn line by line with the same probabilities from the first line to
the last. A problem is held out for the test set if a hash of its numbers and target says so.
"""

import argparse
import hashlib
import random
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

from data.embedded import write_jsonl, write_pair

LARGEST, LARGEST_TARGET = 30, 100
TO_THE_END = 6000  # tokens of a search of all branches, at most: then faulty searches end as well
DEPTHS = "abcdefghij"
# Lengths of the responses in tokens, from and up to: percentage of the problems. The rare ones come first.
LONG = {(3500, 4000): 11, (3000, 3500): 6, (2000, 3000): 28, (1500, 2000): 30, (1000, 1500): 25}
# Faults, each with its probability a line: not going deeper where at most 8 remain ("nothing will fit in so little"),
# taking 1 left over for 0, overlooking a number, a remainder wrong by 1 or 2.
FAULTS = {"impatient": 0.6, "settle": 0.02, "skip": 0.005, "slip": 0.005}


def search_lengths(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """numbers (B, n), B lists -> (B, LARGEST_TARGET + 1) each, for every target: how many solutions it has, tokens of
    its response, and tokens of a search that goes on to the end of all branches.

    Backwards over the numbers: what the search does from number i on, for every remainder, follows from what it does
    from i + 1 on. Two searches are counted side by side, one that ends with the first solution and one that never does.
    """
    B, R = len(numbers), LARGEST_TARGET + 1
    r, none = np.arange(R)[None], np.zeros((B, R), int)  # every remainder
    solutions, size, found = none + (r == 0), none, none > 0
    lines, depths = np.zeros((2, B, R), int), np.zeros((2, B, R), int)  # to the first solution; to the end
    for v in reversed(numbers.T):
        v = v[:, None]
        inside, deeper, hit = np.maximum(r - v, 0), r > v, r == v  # inside: the remainder after v

        def at(x, inside=inside):
            return np.take_along_axis(x, inside, -1)

        found_inside = deeper & at(found)
        ended = np.stack((hit | found_inside, none > 0))  # then the rest is not tried
        size = np.where(hit, 1, np.where(found_inside, 1 + at(size), size))
        lines_inside, depths_inside = (np.stack([deeper * at(y) for y in x]) for x in (lines, depths))
        depths = 1 + depths_inside + lines_inside + np.where(ended, 0, depths)
        lines = 1 + lines_inside + np.where(ended, 0, lines)
        solutions = solutions + (r >= v) * at(solutions)
        found = found | hit | found_inside
    tokens = 5 * lines + 3 * depths  # a line: target, three tokens a depth, move, depth, number, newline
    return solutions, tokens[0] - 3 + 2 + 2 * size, tokens[1]


def make_problems(rng: random.Random, wanted: dict[tuple, int], count: tuple[int, int], test: bool) -> list[dict]:
    """Draw problems {"numbers", "target"} with one solution. wanted: how many with a response of so many tokens, from
    and up to; count: how many numbers, from and up to."""
    problems, wanted = {}, dict(wanted)
    while any(wanted.values()):
        n = rng.randint(*count)
        lists = [sorted(rng.sample(range(2, LARGEST + 1), n), reverse=True) for _ in range(64)]
        solutions, length, to_the_end = search_lengths(np.array(lists))
        usable = (solutions == 1) & (to_the_end <= TO_THE_END)
        for k, numbers in enumerate(lists):
            usable[k, : numbers[0] + 1] = False  # no number may reach the target alone
            for (low, high), left in wanted.items():
                targets = np.flatnonzero(usable[k] & (length[k] >= low) & (length[k] < high)).tolist() if left else []
                targets = [t for t in targets if is_test(numbers, t) == test and (*numbers, t) not in problems]
                if targets:
                    target = rng.choice(targets)
                    problems[(*numbers, target)] = {"numbers": numbers, "target": target}
                    wanted[low, high] -= 1
                    break
    problems = list(problems.values())
    rng.shuffle(problems)
    return problems


def is_test(numbers: list[int], target: int) -> bool:
    return hashlib.sha256(f"{numbers}:{target}".encode()).digest()[0] < 16


def prompt_text(problem: dict) -> str:
    return "".join(f"{n}," for n in problem["numbers"]) + f"={problem['target']}\n"


def write_search(problem: dict, rng: random.Random, faults: dict[str, float] | None = None) -> tuple[str, str]:
    """(response, answer), careful or with faults. The answer is "?" where the list was used up without a solution."""
    numbers, target = problem["numbers"], problem["target"]

    def happens(fault: str) -> bool:
        return faults is not None and rng.random() < faults[fault]

    lines, stack, remains = [], [0], [target]  # indices into numbers; what remains before each of them
    while True:
        left = remains[-1] - numbers[stack[-1]]
        if happens("slip"):
            left = left + rng.choice((-2, -1, 1, 2)) or 1
        state = [f" {DEPTHS[d]}{numbers[i]}={r if r >= 0 else 'x'}"
                 for d, (i, r) in enumerate(zip(stack, remains[1:] + [left]))]
        line = f"={target}" + "".join(state)
        if left == 0 or (left == 1 and happens("settle")):
            answer = " ".join(f"{DEPTHS[d]}{numbers[i]}" for d, i in enumerate(stack))
            return "\n".join([*lines, line, f"#### {answer}"]), answer
        following = stack[-1] + (2 if happens("skip") else 1)
        if following >= len(numbers):
            move = "<"
            stack.pop()
            if not stack:
                return "\n".join([*lines, line, "#### ?"]), "?"
            remains.pop()
            stack[-1] += 1
        elif left > 0 and not (left <= 8 and happens("impatient")):
            move = "+"
            stack.append(following)
            remains.append(left)
        else:
            move = ">"
            stack[-1] = following
        lines.append(f"{line} {move} {DEPTHS[len(stack) - 1]}{numbers[stack[-1]]}")


def make_rows(
    wanted: int, seed: str, *, test: bool = False, lengths: dict[tuple, int] = LONG, count: tuple[int, int] = (8, 9),
    faults: dict[str, float] | None = None, solutions: bool = True,
) -> list[dict]:
    """Rows {"prompt", "answer", "solution"} of distinct problems, the solution only where `solutions`. lengths: ranges
    of tokens, each with its percentage of the rows; count: how many numbers, from and up to."""
    rng, rows = random.Random(seed), []
    for problem in make_problems(rng, {k: wanted * share // 100 for k, share in lengths.items()}, count, test):
        solution, answer = write_search(problem, rng)
        if faults:
            solution, _ = write_search(problem, rng, faults)
            if len(solution) > 2.1 * 4096:  # about so many characters a token: a slip has made it long
                continue
        rows.append({"prompt": prompt_text(problem), "answer": answer} | ({"solution": solution} if solutions else {}))
    return rows


def write_tokenizer() -> None:
    """The split pattern keeps every word of the notation in one piece, hence one token: `26,` in the prompt, `26` on
    the stack and `=26` as a remainder are three tokens."""
    words = [f"{i},{i}" for i in range(2, LARGEST + 1)] + [f"={i}" for i in range(LARGEST_TARGET + 1)]
    words += [f" {d}" for d in DEPTHS] + ["=x", " +", " >", " <", "#### ?", "\n"]
    write_pair(HERE, r"=?\d{1,3},?|=x| ?[a-z+<>]|#+|\n|.", words, rope_theta=1e6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sft", nargs="*", metavar="LESSON", help="also the supervised text: of all lessons, or of "
                        "some (short, middle, long, faulty)")
    parser.add_argument("--tokenizer", action="store_true", help="also the tokenizer and the configurations")
    args = parser.parse_args()
    train, test = make_rows(4000, "train", solutions=False), make_rows(500, "test", test=True, solutions=False)
    write_jsonl(HERE / "train.jsonl", train)
    write_jsonl(HERE / "test.jsonl", test)
    if args.tokenizer:
        write_tokenizer()
    middle = {"lengths": {(100, 1200): 100}, "count": (6, 9)}
    lessons = {
        "short": lambda: make_rows(40_000, "short", lengths={(30, 300): 100}, count=(4, 6)),
        "middle": lambda: make_rows(8_000, "middle", **middle),
        "long": lambda: make_rows(16_000, "long") + make_rows(4_000, "some of middle length", **middle),
        "faulty": lambda: make_rows(4_000, "faulty", faults=FAULTS),
    }
    for name, rows in lessons.items():
        if args.sft is not None and name in (args.sft or lessons):
            write_jsonl(HERE / f"sft_{name}.jsonl", rows())


if __name__ == "__main__":
    main()
