"""eval.py: the statistics against their definitions, and an evaluation that is interrupted and goes on."""

import json
import re

import pytest
import torch

import eval as evaluation
import sample
from data import HERE, InputError, load_jsonl, run_command
from data.flags import parse_flags
from data.tokenizer import Tokenizer
from model import Transformer
from sample import Rollout

STUDENT, TEACHER = HERE / "chains/student", HERE / "chains/teacher"
ROWS = load_jsonl(HERE / "chains/test.jsonl")


def run(*flags) -> None:
    evaluation.main(parse_flags(evaluation.Config, "", ["--device", "cpu", *map(str, flags)]))


def evaluate(folder, rows, **options):
    tokenizer = Tokenizer(folder)
    model, rows = Transformer.frozen(folder, torch.device("cpu"), tokenizer.vocab_size), [dict(r) for r in rows]
    evaluation.encode_prompts(rows, tokenizer, 644, "--data chains")
    return evaluation.evaluate(model, tokenizer, rows, stop_ids=tokenizer.stop_ids, **options)


def test_bootstrap_and_wilson_agree_where_both_hold():
    values = [1.0] * 300 + [0.0] * 700
    assert evaluation.bootstrap(values) == pytest.approx(evaluation.wilson(300, 1000), abs=0.004)
    assert evaluation.wilson(300, 1000) == pytest.approx((0.2724, 0.3291), abs=1e-4)
    assert evaluation.bootstrap([0.5] * 9) == (0.5, 0.5)


def test_a_summary_counts_what_it_says():
    def record(problem, correct, finished, tokens, extracted):
        return {"problem": problem, "answer": "1", "correct": correct, "finished": finished, "tokens": tokens,
                "extracted": extracted}

    s = evaluation.summarize([record(0, True, True, 10, "1"), record(0, False, False, 50, None),
                              record(1, True, True, 20, "1"), record(1, True, True, 30, "1")], 2)
    assert s["accuracy"] == 0.75
    assert (s["finish"], s["no_answer"], s["accuracy_given_finish"]) == (0.75, 0.25, 1.0)
    assert (s["mean_len"], s["median_len"]) == (27.5, 20.0)
    assert 45 < s["len_95"] < 50 and 0.1 < s["low"] < 0.75 < s["high"] <= 1.0


@pytest.mark.parametrize("right", [0, 1, 59, 60])
def test_problems_that_are_nearly_all_alike_do_not_make_it_certain(right):
    record = {"answer": "1", "finished": True, "tokens": 1, "extracted": "1"}
    s = evaluation.summarize([{**record, "correct": i < right} for i in range(60)], 2)
    assert (s["low"], s["high"]) == evaluation.wilson(right / 2, 30) and s["high"] - s["low"] > 0.1


def test_by_position_is_a_mean_by_octave():
    found = evaluation.by_position(torch.tensor([1.0, 2.0, 3.0, 5.0]), torch.tensor([0, 1, 2, 3]))
    assert found == {"0": 1.0, "1": 2.0, "2": 4.0}


@pytest.mark.parametrize("problems, samples, cap, parts", [(9, 2, 40, 1), (3, 200, 4, 2)])
def test_the_result_does_not_depend_on_parts_slots_or_what_was_done(problems, samples, cap, parts):
    flags, seen = {"max_new_tokens": cap, "temperature": 1.0, "num_samples": samples}, []
    summary, records = evaluate(STUDENT, ROWS[:problems], **flags, keep=seen.append)
    assert len(seen) == parts and len(records) == problems * samples
    assert len({r["response"] for r in records}) > problems  # the samples of a problem differ
    done = [r for r in records if r["problem"] in (0, 2)]
    for more in ({"slots": 3 if parts == 1 else 70}, {"done": done}):
        other, others = evaluate(STUDENT, ROWS[:problems], **flags, **more)
        assert others == records and {**other, "seconds": 0} == {**summary, "seconds": 0}


def test_an_evaluation_that_was_interrupted_goes_on(tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    flags = ("--data", "chains", "--num_problems", "6", "--num_samples", "2", "--temperature", "0.7",
             "--max_new_tokens", "80", "--out", tmp_path / "out.json")
    run(*flags)
    said = capsys.readouterr().out
    for text in ("on chains: 6 problems, answers to each: 2, temperature 0.7", "(95%: ", "P(finish)", "if finished",
                 "length: mean", "cut at 80", "the first problem:\n"):
        assert text in said
    whole = json.loads((tmp_path / "out.json").read_text())
    lines = out.read_text().splitlines(keepends=True)
    assert len(lines) == 1 + 2 * 6
    assert all("<|im_end|>" not in r["response"] for r in map(json.loads, lines[1:]) if r["finished"])
    wrong = re.sub('"correct": (true|false)', '"correct": null', lines[5])  # graded before an answer was mended
    out.write_text("".join(lines[:6]) + wrong + lines[6][:30])  # started twice; killed in the middle of a line
    run(*flags)
    assert "5 responses are in" in capsys.readouterr().out
    assert sorted(out.read_text().splitlines(keepends=True)) == sorted(lines)
    again = json.loads((tmp_path / "out.json").read_text())
    assert {**again["summary"], "seconds": 0} == {**whole["summary"], "seconds": 0}
    for other in (("--temperature", "0.8"), ("--model", TEACHER)):
        with pytest.raises(InputError, match="or responses made with other flags or weights"):
            run(*flags, *other)
    out.write_text("# Notes\n")
    with pytest.raises(InputError, match="exists and holds something else"):
        run(*flags)
    assert out.read_text() == "# Notes\n"


def test_where_memory_runs_out_it_is_said_what_to_lower(monkeypatch, capsys):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(evaluation, "generate", full)
    config = parse_flags(evaluation.Config, "", ["--device", "cpu", "--data", "chains"])
    with pytest.raises(SystemExit) as ended:
        run_command(evaluation.main, config)
    assert ended.value.code == 2
    assert "error: out of memory; lower --batch_size or --micro_tokens" in capsys.readouterr().err
    monkeypatch.setattr(evaluation, "generate", lambda *_, **__: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="size"):  # a mistake of ours is a traceback
        run_command(evaluation.main, config)


def test_top_k_and_top_p_reach_the_sampler():
    options = {"max_new_tokens": 40, "seed": 3}
    _, greedy = evaluate(STUDENT, ROWS[:6], **options)
    for name, cut in (("top_k", 1), ("top_p", 1e-9)):
        assert evaluate(STUDENT, ROWS[:6], temperature=1.0, **{name: cut}, **options)[1] == greedy
    assert evaluate(STUDENT, ROWS[:6], temperature=1.0, **options)[1] != greedy


@pytest.mark.parametrize("module", [evaluation, sample])
def test_the_flags_of_sampling_reach_the_sampler(module, monkeypatch):
    asked, generate = [], module.generate
    monkeypatch.setattr(module, "generate", lambda model, prompts, cap, stops, *how, **options: asked.append(
        (cap, how, options["seeds"])) or generate(model, prompts, cap, stops, *how, **options))
    flags = f"--model {STUDENT} --data chains --temperature 0.6 --top_k 7 --top_p 0.9 --seed 5 --max_new_tokens 4"
    few, seeds = (" --num_problems 1", evaluation.seeds_of(5, 1)[0]) if module is evaluation else ("", [5])
    module.main(parse_flags(module.Config, "", (flags + few).split()))
    assert asked == [(4, (0.6, 7, 0.9), seeds)]


@pytest.mark.parametrize("opened, extracted", [("", "3"), ("<think>\n", None)])
def test_what_stands_in_a_thought_that_the_prompt_opened_is_no_answer(opened, extracted, monkeypatch):
    tokenizer, said = Tokenizer(TEACHER), []
    monkeypatch.setattr(evaluation, "generate", lambda _, prompts, *args, **options: said.append(prompts) or Rollout.of(
        prompts, [tokenizer.encode(r"so \boxed{3}")] * len(prompts), (2,)))
    _, (record,) = evaluate(TEACHER, [{"prompt": "Dan?\n" + opened, "answer": "3"}], max_new_tokens=9)
    assert said and (record["extracted"], record["correct"]) == (extracted, extracted == "3")


def test_the_embedded_teacher_is_right_and_ends():
    summary, _ = evaluate(TEACHER, ROWS[:500], max_new_tokens=512)
    assert summary["accuracy"] >= 0.95 and summary["finish"] == 1.0
