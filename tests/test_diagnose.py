"""data/diagnose.py: the numbers behind the pictures, and that the pictures appear."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import eval as evaluation
from data import HERE, InputError, diagnose
from data.tokenizer import Tokenizer
from model import Transformer
from sample import generate

ROOT = Path(evaluation.__file__).parent
STUDENT, TEACHER = HERE / "chains/student", HERE / "chains/teacher"


def config(tmp_path, **flags):
    return diagnose.Config(**{"num_problems": 12, "max_new_tokens": 60, "out": str(tmp_path / "p.png"), **flags})


def test_positions_are_the_definition_position_by_position(tmp_path):
    c = config(tmp_path, num_problems=4)
    diagnose.positions(c)
    found = json.loads((tmp_path / "p.json").read_text())["chains/student"]
    assert (tmp_path / "p.png").stat().st_size > 10_000
    students, teacher, _, stops, vocab, rows = diagnose.load(c)
    student = students["chains/student"]
    rollout = generate(student, [r["prompt_ids"] for r in rows[:4]], 60, stops, vocab=vocab,
                       generator=torch.Generator().manual_seed(c.seed))  # fmt: skip
    by_position: dict[int, list] = {}
    for i in range(4):
        n, p = int(rollout.lens[i]), int(rollout.prompt_lens[i])
        tokens = rollout.tokens[i : i + 1, : n + p - 1]
        with torch.no_grad():
            log_p, log_q = ((m(tokens)[0, p - 1 :] @ m.head[:vocab].T).log_softmax(-1) for m in (student, teacher))
        for j in range(n):
            kl = (log_p[j].exp() * (log_p[j] - log_q[j])).sum()
            by_position.setdefault(j, []).append((kl.item(), float(log_p[j].argmax() == log_q[j].argmax())))
    full = [j for j, values in by_position.items() if len(values) >= 4]
    assert found["position"] == full and found["responses"] == [4.0] * len(full)
    expected = [sum(kl for kl, _ in by_position[j]) / 4 for j in full]
    assert found["kl"]["mean"] == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert found["agree"]["mean"] == pytest.approx([sum(a for _, a in by_position[j]) / 4 for j in full])


def test_positions_on_the_teachers_responses_say_how_the_student_finds_them(tmp_path, capsys):
    c = config(tmp_path, num_problems=4, responses="teacher", student="chains/student,chains/teacher")
    diagnose.positions(c)
    first, second = (line for line in capsys.readouterr().out.splitlines() if "perplexity" in line)
    students, teacher, _, stops, vocab, rows = diagnose.load(c)
    rollout = generate(teacher, [r["prompt_ids"] for r in rows[:4]], 60, stops, vocab=vocab,
                       generator=torch.Generator().manual_seed(c.seed))  # fmt: skip
    logprobs = []
    for i in range(4):
        n, p = int(rollout.lens[i]), int(rollout.prompt_lens[i])
        tokens, model = rollout.tokens[i, : n + p], students["chains/student"]
        with torch.no_grad():
            log_p = (model(tokens[None, :-1])[0, p - 1 :] @ model.head[:vocab].T).log_softmax(-1)
        logprobs += log_p.gather(1, tokens[p:, None])[:, 0].tolist()
    assert float(first.split()[-1]) == pytest.approx(math.exp(-sum(logprobs) / len(logprobs)), abs=1e-3)
    assert "KL 0.0000" in second or "KL -0.0000" in second  # the teacher against itself


def test_teacher_prefix_gives_what_it_says(tmp_path, capsys):
    diagnose.teacher_prefix(config(tmp_path, lens="0,4,60", num_problems=20))
    found = json.loads((tmp_path / "p.json").read_text())
    ours = found["chains/student after k tokens of the teacher's"]
    theirs = found["teacher after k tokens of chains/student's"]
    assert [p["k"] for p in ours] == [p["k"] for p in theirs] == [0, 4, 60]
    assert ours[0]["given_whole"] == theirs[0]["given_whole"] == 0
    assert ours[-1]["given_whole"] == theirs[-1]["given_whole"] == 1.0
    # who is given everything is as right as the one who wrote it
    assert ours[-1]["accuracy"] == theirs[0]["accuracy"] and theirs[-1]["accuracy"] == ours[0]["accuracy"]
    assert ours[0]["accuracy"] < ours[1]["accuracy"] and "k = 4: accuracy" in capsys.readouterr().out
    with pytest.raises(InputError, match="--lens many: expected numbers"):
        diagnose.teacher_prefix(config(tmp_path, lens="many"))


def test_stops_are_the_models_own_probabilities(tmp_path):
    diagnose.stops(config(tmp_path, num_problems=3, max_new_tokens=512))
    found = json.loads((tmp_path / "p.json").read_text())["chains/student"]
    ended = next(v for k, v in found.items() if k.startswith("student, ") and "ended" in k)
    assert found["stop_ids"] == {"2": "<|im_end|>"} and 0.5 < ended[0] <= 1


def test_tokens_page_takes_no_text_for_markup(tmp_path):
    data = tmp_path / "evil.jsonl"
    data.write_text(json.dumps({"prompt": "<script>alert(1)</script>&amp;\nDan?\n"}) + "\n")
    diagnose.tokens(config(tmp_path, data=str(data), out=str(tmp_path / "t.html")))
    page = (tmp_path / "t.html").read_text()
    assert "<script" not in page and "&lt;script&gt;alert(1)&lt;/script&gt;&amp;amp;" in page
    tokenizer, model = Tokenizer(STUDENT), Transformer.from_pretrained(STUDENT)
    rollout = generate(model, [tokenizer.encode_prompt("<script>alert(1)</script>&amp;\nDan?\n")], 60, (2,),
                       vocab=tokenizer.vocab_size, generator=torch.Generator().manual_seed(1337))  # fmt: skip
    assert page.count("<span") == int(rollout.lens[0])


def fake_run(folder: Path, prefix_len: int, seed: int, accuracies: list[float]) -> str:
    folder.mkdir()
    settings = {"prefix_len": prefix_len, "seed": seed, "schedule": "constant", "out_dir": str(folder)}
    (folder / "config.json").write_text(json.dumps(settings))
    lines = []
    for step, a in enumerate(accuracies):
        if step:
            lines.append({"step": step, "loss": 1.0, "total_flop": step * prefix_len * 1e9, "total_seconds": step * 1.0,
                          "total_tokens_trained": step * prefix_len})  # fmt: skip
        lines.append({"step": step, "eval": "student", "manner": "sampled", "accuracy": a, "finish": 1.0,
                      "mean_len": 9})  # fmt: skip
    (folder / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines) + '{"torn')
    return str(folder)


def test_runs_are_grouped_by_what_differs_and_the_saving_is_of_flop(tmp_path, capsys):
    folders = [fake_run(tmp_path / "a1", 10, 1, [0.2, 0.6, 0.8]), fake_run(tmp_path / "a2", 10, 2, [0.2, 0.8, 0.9]),
               fake_run(tmp_path / "b1", 100, 1, [0.2, 0.8, 1.0]), fake_run(tmp_path / "b2", 100, 2, [0.2, 0.6, 0.7])]
    diagnose.compare_runs(folders, str(tmp_path / "runs.png"), goals=(0.7, 0.95))
    found, said = json.loads((tmp_path / "runs.json").read_text()), capsys.readouterr().out
    assert list(found)[:2] == ["prefix_len 10", "prefix_len 100"] and found["prefix_len 10"]["seeds"] == [1, 2]
    needed = found["flop_to_reach_sampled_accuracy"]["0.7"]
    # 0.6 -> 0.8 crosses 0.7 in the middle of step 2; 0.2 -> 0.8 at 5/6 of step 1
    assert needed["prefix_len 10"] == pytest.approx([1.5e10, 10e9 * 5 / 6])
    assert needed["prefix_len 100"] == pytest.approx([100e9 * 5 / 6, 2e11])
    saving = (100e9 * 5 / 6 + 2e11) / (1.5e10 + 10e9 * 5 / 6)
    assert f"2 of 2 runs, 1.17e+10 (8.33e+09 to 1.5e+10), {saving:.2f}x" in said
    assert "0 of 2 runs" in said and (tmp_path / "runs.png").stat().st_size > 10_000
    # The short prefix ends at 2e10 FLOP: there, and at half of it, all are compared
    assert list(found["at_equal_flop"]) == ["10000000000.0", "20000000000.0"]
    equal = found["at_equal_flop"]["20000000000.0"]
    assert equal["prefix_len 10"]["sampled_accuracy"] == pytest.approx([0.8, 0.9])
    assert equal["prefix_len 100"]["sampled_accuracy"] == pytest.approx([0.2 + 0.6 / 5, 0.2 + 0.4 / 5])
    assert "At 2e+10 FLOP" in said and "accuracy, sampled 0.850 (0.800 to 0.900)" in said
    assert math.isnan(diagnose.at_cost([{"flop": 0.0, "x": 0.1}, {"flop": 1.0, "x": 0.2}], "x", "flop", 1.5))
    assert math.isnan(diagnose.flop_to_reach([{"flop": 0.0, "x": 0.1}], "x", 0.5))
    assert diagnose.flop_to_reach([{"flop": 0.0, "x": 0.6}], "x", 0.5) == 0.0
    older = tmp_path / "a1/config.json"  # written before there was a flag, which then was off
    runs = [str(tmp_path / x) for x in ("a1", "a2")]
    newer = tmp_path / "a2/config.json"
    newer.write_text(json.dumps({**json.loads(older.read_text()), "full_every": 5, "seed": 2}))
    assert list(diagnose.group_runs(runs)) == ["all runs", "full_every 5"]
    (tmp_path / "a1/log.jsonl").write_text("")
    with pytest.raises(InputError, match="train with --eval_every"):
        diagnose.compare_runs(runs)
    with pytest.raises(InputError, match="no log.jsonl there"):
        diagnose.compare_runs([str(tmp_path)])


@pytest.mark.parametrize("command, message", [
    ("position", "position: no such command; positions, teacher_prefix, stops, tokens and runs are"),
    ("positions --num_problems 0", "--num_problems must be at least 1, found 0"),
    ("tokens --index 5000", "--index 5000: the data has rows 0 to 999"),
    ("runs", "usage: python eval.py runs RUN_FOLDER"),
])  # fmt: skip
def test_the_command_line_says_what_is_wrong(command, message, tmp_path):
    result = subprocess.run([sys.executable, ROOT / "eval.py", *command.split()], capture_output=True, text=True,
                            cwd=tmp_path, check=False)  # fmt: skip
    assert result.returncode == 2 and message in result.stderr, result.stderr
