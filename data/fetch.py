"""What the prepare.py of every public data set does: read its rows from the hub or from a local copy, convert them, and
write train.jsonl and test.jsonl beside the prepare.py. Nothing is written before everything has been read.

    python data/math/prepare.py                    # from the hub; needs `pip install datasets`
    python data/math/prepare.py --source FOLDER    # from local copies of the published files, named in the readme
"""

import argparse
import csv
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data import InputError, fail, load_jsonl

BOXED = "\n\nReason step by step, and put your final answer within \\boxed{}."
LETTER = "\n\nReason step by step, and put the letter of your choice within \\boxed{}."


@dataclass
class Split:
    name: str  # of the file to write, without .jsonl
    hub: tuple[str, str | tuple[str, ...] | None, str]  # data set, configuration(s), split
    source: str  # file in --source's folder: .jsonl, .csv or .parquet
    convert: Callable[[dict], dict | None]  # a published row -> prompt, answer, perhaps solution; None leaves it out
    expected: int | None = None  # rows, where that is known


def from_hub(split: Split) -> list[dict]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise InputError("the download needs `pip install datasets`; or give a local copy by --source") from None
    name, configurations, part = split.hub
    configurations = configurations if isinstance(configurations, tuple) else (configurations,)
    try:
        return [row for c in configurations for row in load_dataset(name, c, split=part)]
    except Exception as error:  # offline, gated, gone: there are a dozen types for it  # noqa: BLE001
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"the hub did not give {name} ({reason}). If it is gated, accept its terms on its page "
                         "and run `hf auth login`; without a network, give a local copy with --source") from None


def from_file(path: Path) -> list[dict]:
    if path.suffix == ".jsonl":
        return load_jsonl(path, need=())
    try:
        if path.suffix == ".csv":
            with open(path, encoding="utf-8", newline="") as file:
                return list(csv.DictReader(file))
        from datasets import load_dataset

        return list(load_dataset("parquet", data_files=str(path), split="train"))
    except (OSError, ValueError, ImportError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read ({str(error).strip().splitlines()[0]})") from None


def prepare(here: Path, splits: list[Split], source: str = "") -> None:
    """Read, convert, write, and print counts and checksums. Raises InputError when a row has not the published form."""
    if source and Path(source).resolve() == here:
        raise InputError(f"--source {source} is the folder that is written to: keep the published files elsewhere")
    texts = []
    for split in splits:
        rows = from_file(Path(source) / split.source) if source else from_hub(split)
        converted = []
        for number, row in enumerate(rows, start=1):
            try:
                converted.append(split.convert(row))
            except (KeyError, TypeError, AttributeError, ValueError) as error:
                raise InputError(f"{split.source if source else split.hub[0]}, row {number}: not of the published form "
                                 f"({type(error).__name__}: {error})") from None
        converted = [row for row in converted if row is not None]
        if not converted:
            raise InputError(f"{split.name}: no rows in it")
        texts.append("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in converted))
    for split, text in zip(splits, texts):
        path = here / f"{split.name}.jsonl"
        path.with_suffix(".incomplete").write_text(text, encoding="utf-8", newline="\n")
        os.replace(path.with_suffix(".incomplete"), path)
        count = text.count("\n")
        note = "" if split.expected in (None, count) else f" (expected {split.expected:,})"
        print(f"{path.name}: {count:,} rows{note}, sha256 {hashlib.sha256(text.encode()).hexdigest()[:16]}")


def choices(question: str, options: list[str], right: int) -> dict:
    """A multiple-choice row: options by letter, the right one's letter as the answer."""
    listed = "\n".join(f"{'ABCDEFGHIJ'[i]}. {option.strip()}" for i, option in enumerate(options))
    return {"prompt": f"{question.strip()}\n\n{listed}{LETTER}", "answer": "ABCDEFGHIJ"[right]}


def main(file: str, doc: str, splits: list[Split]) -> None:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    files = ", ".join(split.source for split in splits)
    parser.add_argument("--source", default="", help=f"folder with local copies: {files}")
    try:
        prepare(Path(file).resolve().parent, splits, parser.parse_args().source)
    except (InputError, OSError) as error:
        fail(str(error))
