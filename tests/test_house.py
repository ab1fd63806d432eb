"""The house holds: which file may know which, how many flags there are, and which words are not ours."""

import ast
import dataclasses
import re
from pathlib import Path

import pytest

import train

ROOT = Path(train.__file__).parent
ORDER = ["data", "model", "sample", "eval", "train"]  # each may import those before it


def imports_of(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("name", ["model", "sample", "eval", "train"])
def test_arrows_point_one_way(name):
    allowed = set(ORDER[: ORDER.index(name)]) | ({"loss"} if name in ("eval", "train") else set())
    assert imports_of(ROOT / f"{name}.py") & {*ORDER, "loss"} <= allowed


def test_data_knows_none_of_the_five_and_loss_knows_torch_alone():
    for file in (ROOT / "data").rglob("*.py"):
        assert not imports_of(file) & {"loss", "model", "sample", "eval", "train"}, file
    assert imports_of(ROOT / "loss.py") == {"torch"}


def test_there_are_few_flags():
    assert len(dataclasses.fields(train.Config)) <= 46


RETIRED = (r"\bbooks?\b|\bjudged?\b|\btick\b|\bbirth\b|\bextents?\b|\badmit\b|\bmanner\b|as long as may be"
           r"|to be had|what there is\b|theirs? books|fmt: skip")


def test_retired_words_are_not_used():
    for file in [*ROOT.glob("*.py"), ROOT / "README.md", *(ROOT / "data").glob("*.py")]:
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
            assert not re.search(RETIRED, line), f"{file.name}:{number}: {line.strip()}"
