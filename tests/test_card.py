"""tests/card.sh, the one command for the first GPU: in its reduced size, so that no typo costs a card."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
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
    said, status = card(tmp_path / "out", sys.executable)
    texts = {name: (tmp_path / f"out/{name}.txt").read_text() for name in status}
    assert set(status.values()) == {"0"}, "\n".join(texts[name] for name in status if status[name] != "0")
    assert "Traceback" not in texts["bench"]
    found = json.loads(said.splitlines()[-1])
    assert {*found} == {"tests", "plain", "resumed", "plain less resumed", "graphs", "compiled", "cpu", "bench"}
    bench, plain, graphs, cpu = (found[name] for name in ("bench", "plain", "graphs", "cpu"))
    assert len(bench) > 35 and all(x >= 0 for name, x in bench.items() if name not in ("device", "torch"))
    errors = {name: x for name, x in bench.items() if "error" in name}
    assert len(errors) == 11 and all(x < (2e-2 if "bfloat16" in name else 1e-2) for name, x in errors.items()), errors
    assert found["plain less resumed"] == {"step": 0, "loss": 0, "grad_norm": 0}
    assert len(plain["accuracy"]) == 2 and plain["seconds per step"] > 0
    assert graphs["loss"] == found["compiled"]["loss"] == plain["loss"]
    with tarfile.open(tmp_path / "out.tgz") as taken:
        assert {"./table.txt", "./bench.txt", "./plain/log.jsonl"} <= {*taken.getnames()}
    assert plain["loss"] == pytest.approx(cpu["loss"], rel=0.1)  # bfloat16 against float32
    script = (ROOT / "tests/card.sh").read_text()
    assert sum(map(int, re.findall(r"part (?!cpu)\w+ (\d+)", script))) <= 480  # seconds; cpu runs beside the others
    for name in re.findall(r"(?:tests|data)/\w+\.\w+", script):
        assert (ROOT / name).is_file(), name


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "plain").mkdir()
    done = subprocess.run(["bash", "tests/card.sh", tmp_path], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "something else" in done.stdout and [*tmp_path.iterdir()] == [tmp_path / "plain"]


def test_parts_that_fail_do_not_stop_the_next(tmp_path):
    _, status = card(tmp_path / "out", "false")
    assert status == dict.fromkeys(("cpu", "tests", "plain", "bench", "graphs", "compiled"), "1")
