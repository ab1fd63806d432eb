"""tests/card.sh, the one command for the first GPU: in its reduced size, so that no typo costs a card."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(shutil.which("timeout") is None, reason="needs the timeout of GNU or busybox")


def card(out: Path, python: str) -> tuple[str, dict[str, str]]:
    """What it prints, and each part's exit status."""
    environment = os.environ | {"CARD_TINY": "1", "PYTHON": python}
    done = subprocess.run(["bash", "tests/card.sh", out], cwd=ROOT, env=environment, capture_output=True, text=True,
                          check=False)
    return done.stdout, dict(re.findall(r"^(\w+): status (\d+)", (out / "parts.txt").read_text(), re.MULTILINE))


def test_every_part_runs_and_its_numbers_reach_the_table(tmp_path):
    shutil.copytree(ROOT / "data/chains/teacher", tmp_path / "model")
    shutil.copy(ROOT / "data/chains/test.jsonl", tmp_path / "gsm8k.jsonl")
    said, status = card(tmp_path / "out", sys.executable)
    texts = {name: (tmp_path / f"out/{name}.txt").read_text() for name in status}
    assert set(status.values()) == {"0"}, "\n".join(texts[name] for name in status if status[name] != "0")
    assert list(status)[-3:] == ["bench", "prune", "smollm2"] and "Traceback" not in texts["bench"]
    found = json.loads(said.splitlines()[-1])
    assert {*found} == {"tests", "plain", "compiled", "cpu", "smollm2", "bench"}
    bench, plain, compiled, cpu = (found[name] for name in ("bench", "plain", "compiled", "cpu"))
    assert len(bench) > 25 and all(x > 0 for name, x in bench.items() if name not in ("device", "torch"))
    assert bench["loss, error of the gradient of the head"] < 1e-2
    assert len(plain["accuracy"]) == 2 and plain["seconds per step"] > 0 and compiled["loss"] == plain["loss"]
    assert plain["loss"] == pytest.approx(cpu["loss"], rel=0.1)  # bfloat16 against float32
    script = (ROOT / "tests/card.sh").read_text()
    assert sum(map(int, re.findall(r"part (?!cpu)\w+ (\d+)", script))) <= 480  # seconds; cpu runs beside the others
    for name in re.findall(r"(?:tests|data)/\w+\.\w+", script):
        assert (ROOT / name).is_file(), name


def test_parts_that_fail_do_not_stop_the_next(tmp_path):
    _, status = card(tmp_path / "out", "false")
    assert status == dict.fromkeys(("cpu", "tests", "plain", "compiled", "bench"), "1")
