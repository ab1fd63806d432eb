"""OpenThoughts-114k (Guha et al. 2025): reasoning traces of DeepSeek-R1; to train only. See readme.md."""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from data.fetch import Split, main

SEEN: set[str] = set()


def convert(row: dict) -> dict | None:
    """The first exchange of a conversation, its thought as Qwen3 writes it. A prompt seen before is left out."""
    turns = [(turn["from"], turn["value"]) for turn in row["conversations"] if turn["from"] != "system"]
    (asker, prompt), (answerer, solution) = turns[:2]
    if asker not in ("user", "human") or answerer not in ("assistant", "gpt"):
        raise ValueError(f"turns of {asker!r} and {answerer!r}, expected user and assistant")
    if prompt in SEEN:
        return None
    SEEN.add(prompt)
    tags = (r"\s*<\|begin_of_thought\|>(.*)<\|end_of_thought\|>\s*<\|begin_of_solution\|>(.*?)"
            r"(?:<\|end_of_solution\|>\s*)?")
    if m := re.fullmatch(tags, solution, re.DOTALL):
        solution = f"<think>\n{m[1].strip()}\n</think>\n\n{m[2].strip()}"
    return {"prompt": prompt, "solution": solution}


SPLITS = [Split("train", ("open-thoughts/OpenThoughts-114k", None, "train"), "train.jsonl", convert)]

if __name__ == "__main__":
    main(__file__, __doc__, SPLITS)
