"""GSM8K (Cobbe et al. 2021): grade-school word problems. See readme.md for where it comes from and its licence."""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from data.fetch import BOXED, Split, main


def convert(row: dict) -> dict:
    steps, answer = re.sub(r"<<[^<>]*>>", "", row["answer"]).rsplit("####", 1)
    answer = answer.strip()
    return {"prompt": row["question"] + BOXED, "answer": answer, "solution": f"{steps}\\boxed{{{answer}}}"}


SPLITS = [
    Split("train", ("openai/gsm8k", "main", "train"), "train.jsonl", convert, 7473),
    Split("test", ("openai/gsm8k", "main", "test"), "test.jsonl", convert, 1319),
]

if __name__ == "__main__":
    main(__file__, __doc__, SPLITS)
