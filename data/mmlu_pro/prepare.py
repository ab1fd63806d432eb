"""MMLU-Pro (Wang et al. 2024): questions of fourteen fields with up to ten choices; to test only. See readme.md."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from data.fetch import Split, choices, main


def convert(row: dict) -> dict:
    if row["answer"] != "ABCDEFGHIJ"[int(row["answer_index"])]:
        raise ValueError(f"answer {row['answer']!r} is not choice {row['answer_index']}")
    return {**choices(row["question"], list(row["options"]), int(row["answer_index"])), "category": row["category"]}


SPLITS = [Split("test", ("TIGER-Lab/MMLU-Pro", None, "test"), "test.jsonl", convert, 12032)]

if __name__ == "__main__":
    main(__file__, __doc__, SPLITS)
