"""MATH (Hendrycks et al. 2021): competition problems to train on, and MATH-500 to test. See readme.md."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from data.answers import extract_answer
from data.fetch import BOXED, Split, main

SUBJECTS = ("algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory", "prealgebra",
            "precalculus")


def convert(row: dict) -> dict | None:
    answer = row.get("answer") or extract_answer(row["solution"])
    if answer is None:  # rows 5,342 and 5,344 of the published training split have an empty box
        return None
    return {"prompt": row["problem"] + BOXED, "answer": answer, "solution": row["solution"]}


SPLITS = [
    Split("train", ("EleutherAI/hendrycks_math", SUBJECTS, "train"), "train.jsonl", convert, 7498),
    Split("test", ("HuggingFaceH4/MATH-500", None, "test"), "test.jsonl", convert, 500),
]

if __name__ == "__main__":
    main(__file__, __doc__, SPLITS)
