"""AIME 2024 and 2025: thirty problems each, answers 0 to 999; to test only. See readme.md."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from data.fetch import BOXED, Split, main


def convert(row: dict) -> dict:
    if not 0 <= int(row["answer"]) <= 999:
        raise ValueError(f"answer {row['answer']!r} is not one of 0 to 999")
    return {"prompt": row["problem"] + BOXED, "answer": str(int(row["answer"]))}


SPLITS = [
    Split("aime24", ("HuggingFaceH4/aime_2024", None, "train"), "aime24.jsonl", convert, 30),
    Split("aime25", ("math-ai/aime25", None, "test"), "aime25.jsonl", convert, 30),
]

if __name__ == "__main__":
    main(__file__, __doc__, SPLITS)
