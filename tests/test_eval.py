"""eval.py: the statistics against their definitions, and an evaluation that is cut off and goes on."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import eval as evaluation
from data import HERE, load_jsonl
from data.tokenizer import Tokenizer
from model import Transformer

ROOT = Path(evaluation.__file__).parent


def run(*command) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "eval.py"), *map(str, command)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=300)


def test_pass_at_k_is_the_share_of_draws_with_a_right_one():
    for n, right, k in itertools.product((1, 4, 6), range(7), (1, 2, 4)):
        if right <= n and k <= n:
            draws = list(itertools.combinations([1] * right + [0] * (n - right), k))
            assert evaluation.pass_at(k, n, right) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_bootstrap_and_wilson_agree_where_both_hold():
    values = [1.0] * 300 + [0.0] * 700
    assert evaluation.bootstrap(values) == pytest.approx(evaluation.wilson(300, 1000), abs=0.004)
    assert evaluation.bootstrap([0.5] * 9) == (0.5, 0.5)


def test_a_summary_counts_what_it_says():
    def record(problem, correct, finished, tokens, extracted):
        return {"problem": problem, "correct": correct, "finished": finished, "tokens": tokens, "extracted": extracted}

    s = evaluation.summarize([record(0, True, True, 10, "1"), record(0, False, False, 50, None),
                              record(1, True, True, 20, "1"), record(1, True, True, 30, "1")], 2)  # fmt: skip
    assert (s["accuracy"], s["pass@1"], s["pass@2"]) == (0.75, 0.75, 1.0)
    assert (s["finish"], s["capped"], s["no_answer"], s["accuracy_given_finish"]) == (0.75, 0.25, 0.25, 1.0)
    assert (s["mean_len"], s["median_len"]) == (27.5, 20.0) and 45 < s["len_95"] < 50
    assert 0.5 <= s["low"] < 0.75 < s["high"] <= 1.0


def test_the_result_does_not_depend_on_parts_slots_or_what_was_done(monkeypatch):
    folder = HERE / "chains/student"
    model, tokenizer = Transformer.from_pretrained(folder), Tokenizer(folder)
    rows = load_jsonl(HERE / "chains/test.jsonl")[:9]
    options = {"max_new_tokens": 40, "temperature": 1.0, "num_samples": 2}
    summary, records = evaluation.evaluate(model, tokenizer, rows, **options)
    monkeypatch.setattr(evaluation, "PART", 6)
    seen = []
    other, others = evaluation.evaluate(model, tokenizer, rows, **options, batch_size=3, keep=seen.append)
    again, thirds = evaluation.evaluate(model, tokenizer, rows, **options, done=[r for part in seen[:2] for r in part])
    assert len(seen) == 3 and records == others == thirds
    assert len({r["response"] for r in records}) > 9  # the two samples of a problem differ
    for s in (other, again):
        assert {**s, "seconds": 0} == {**summary, "seconds": 0}


def test_an_evaluation_that_was_killed_goes_on(tmp_path):
    data = tmp_path / "mine.jsonl"
    data.write_text("".join((HERE / "chains/test.jsonl").read_text().splitlines(keepends=True)[:5]))
    flags = ("--data", f"chains,{data}", "--num_problems", "6", "--num_samples", "2", "--temperature", "0.7",
             "--max_new_tokens", "80", "--out", tmp_path / "out.json")  # fmt: skip
    first = run(*flags)
    assert first.returncode == 0, first.stderr
    table = [line.split() for line in first.stdout.splitlines() if line.startswith(("chains ", str(data)))]
    assert [row[1] for row in table] == ["6", "5"] and "temperature 0.7, 2 a problem, cap 80" in first.stdout
    whole = json.loads((tmp_path / "out.json").read_text())
    lines = (tmp_path / "out.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) == 1 + 2 * (6 + 5) == 1 + len(whole["responses"])
    (tmp_path / "out.jsonl").write_text("".join(lines[:6]) + lines[6][:30])  # killed in the middle of a line
    (tmp_path / "out.json").unlink()
    second = run(*flags)
    assert second.returncode == 0 and "4 responses are in" in second.stdout, second.stderr
    again = json.loads((tmp_path / "out.json").read_text())
    assert again["responses"] == whole["responses"]
    other = run(*flags, "--temperature", "0.8")
    assert other.returncode == 2 and "holds responses of another evaluation (temperature differ)" in other.stderr


def test_compare_is_paired(tmp_path):
    def result(name, hits):
        responses = [{"data": "d", "problem": i, "prompt": str(i), "correct": bool(h)} for i, h in enumerate(hits)]
        (tmp_path / name).write_text(json.dumps({"responses": responses}))
        return tmp_path / name

    half = [i % 2 for i in range(40)]
    better = [1 if i < 12 else h for i, h in enumerate(half)]  # six problems more, none lost
    found = run("--compare", f"{result('a.json', half)},{result('b.json', better)}")
    assert found.returncode == 0, found.stderr
    assert "40 problems in both" in found.stdout and "difference +0.150" in found.stdout
    p = float(found.stdout.split("p = ")[1])
    assert p == pytest.approx(2 * 0.5**6, abs=0.01)  # six coins, both sides
    same = evaluation.compare(*[json.loads((tmp_path / "a.json").read_text())] * 2)
    assert same["difference"] == 0 and same["p"] == 1
    assert run("--compare", "a.json").returncode == 2


def test_accuracy_of_the_embedded_teacher_on_500_problems_is_quick():
    import time

    start = time.perf_counter()
    model, tokenizer = Transformer.from_pretrained(HERE / "chains/teacher"), Tokenizer(HERE / "chains/teacher")
    summary, _ = evaluation.evaluate(model, tokenizer, load_jsonl(HERE / "chains/test.jsonl")[:500], max_new_tokens=512)
    assert summary["accuracy"] >= 0.95 and summary["finish"] == 1.0
    print(f"{time.perf_counter() - start:.1f} s")  # 60 are allowed; not asserted, since other work may disturb


def test_by_position_is_a_mean_by_octave():
    found = evaluation.by_position(torch.tensor([1.0, 2.0, 3.0, 5.0]), torch.tensor([0, 1, 2, 3]))
    assert found == {"0": 1.0, "1": 2.0, "2": 4.0}
