"""GSM8K (Cobbe et al. 2021, MIT licence): grade-school word problems, 7,473 to train on and 1,319 to test.

    python data/gsm8k/prepare.py --source FOLDER    # from train.jsonl and test.jsonl as published (question, answer)
    python data/gsm8k/prepare.py                    # from the hub, data set openai/gsm8k; needs `pip install datasets`

Writes train.jsonl and test.jsonl beside this file: prompt (the question), answer (the value after the last ####),
solution (the published one, without the <<...>> calculator notes).
"""

import argparse
import hashlib
import json
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

from data import InputError, load_jsonl, stop


def convert(row: dict) -> dict:
    solution = re.sub(r"<<[^<>]*>>", "", row["answer"])
    return {"prompt": row["question"], "answer": solution.rpartition("####")[2].strip(), "solution": solution}


def main(source: str) -> None:
    for split, expected in (("train", 7473), ("test", 1319)):
        if source:
            rows = load_jsonl(Path(source) / f"{split}.jsonl", need=("question", "answer"))
        else:
            try:
                from datasets import load_dataset
            except ImportError:
                raise InputError(
                    "the download needs `pip install datasets`; or give a local copy with --source"
                ) from None
            rows = list(load_dataset("openai/gsm8k", "main", split=split))
        text = "".join(json.dumps(convert(row), ensure_ascii=False) + "\n" for row in rows)
        (HERE / f"{split}.jsonl").write_text(text, encoding="utf-8", newline="\n")
        note = "" if len(rows) == expected else f" (expected {expected:,})"
        print(f"{split}.jsonl: {len(rows):,} rows{note}, sha256 {hashlib.sha256(text.encode()).hexdigest()[:16]}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="", help="folder with the published train.jsonl and test.jsonl")
    try:
        main(parser.parse_args().source)
    except InputError as error:
        stop(str(error))
