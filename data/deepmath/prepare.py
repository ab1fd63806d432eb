"""DeepMath-103K (He et al. 2025): hard problems with verifiable answers; to train only. See readme.md."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from data.fetch import BOXED, Split, main


def convert(row: dict) -> dict:
    answer, difficulty = str(row["final_answer"]), float(row["difficulty"])
    return {"prompt": row["question"] + BOXED, "answer": answer, "difficulty": difficulty}


SPLITS = [Split("train", ("zwhe99/DeepMath-103K", None, "train"), "train.jsonl", convert, 103110)]

if __name__ == "__main__":
    main(__file__, __doc__, SPLITS)
