"""GPQA diamond (Rein et al. 2023): science questions with four choices, gated; to test only. See readme.md."""

import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from data.fetch import Split, choices, main


def convert(row: dict) -> dict:
    options = [row["Correct Answer"], *(row[f"Incorrect Answer {i}"] for i in (1, 2, 3))]
    order = list(range(4))
    random.Random(row["Question"]).shuffle(order)  # a function of the question: the same on every machine
    return choices(row["Question"], [options[i] for i in order], order.index(0))


SPLITS = [Split("test", ("Idavidrein/gpqa", "gpqa_diamond", "train"), "gpqa_diamond.csv", convert, 198)]

if __name__ == "__main__":
    main(__file__, __doc__, SPLITS)
