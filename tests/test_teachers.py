"""Teachers that read another prompt than the student, and teachers of other families."""

import io
import json
import math
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import train
from data import HERE, InputError, load_jsonl
from data.run import checkpoints, read_log
from data.tokenizer import Tokenizer
from eval import encode_prompts
from model import Transformer, count_flops, count_parameters, load_teacher
from sample import Rollout, generate
from tests.test_train import BLIND, TINY, make_pair, run

STUDENT, TEACHER = HERE / "chains/student", HERE / "chains/teacher"
HINT = "{answer}\n{prompt}"  # what the teacher reads: the answer, then the problem


def log(out: Path) -> list[dict]:
    return [{k: v for k, v in r.items() if "second" not in k and "per_s" not in k} for r in read_log(out / "log.jsonl")]


@pytest.mark.parametrize("flags", [(), ("--mix", "0.5"), ("--rollout", "teacher")])
def test_the_students_own_prompt_as_a_template_changes_nothing(tmp_path, flags):
    for name, more in (("without", ()), ("with", ("--teacher_prompt", "{prompt}"))):
        run(*TINY, *flags, *more, "--steps", "2", "--out_dir", tmp_path / name)
    assert log(tmp_path / "with") == log(tmp_path / "without")
    weights = [load_file(tmp_path / name / "step_000002/model.safetensors") for name in ("with", "without")]
    assert all(torch.equal(w, weights[1][name]) for name, w in weights[0].items())


def test_the_gradient_is_the_definitions_behind_each_models_own_prompt(tmp_path, monkeypatch):
    """float64, ragged, in micro-batches; row by row, all logits, by autograd."""
    student, teacher = (Transformer.from_pretrained(f, dtype=torch.float64) for f in (STUDENT, TEACHER))
    pair, found, log_step = make_pair(student, teacher), {}, train.log_step

    def clip(parameters, most):
        found["gradient"] = [p.grad.clone() for p in pair.student.parameters()]
        return torch.tensor(1.0)

    monkeypatch.setattr(train, "load_pair", lambda *_: pair)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    monkeypatch.setattr(train, "log_step", lambda *args: found.update(rollout=args[2]) or log_step(*args))
    for micro_tokens in (60, 10_000):
        train.train(train.Config(data="chains", out_dir=str(tmp_path), overwrite=True, steps=1, batch_size=7, lr=1e-30,
                                 prefix_len=24, eval_problems=0, eval_kl=0, micro_tokens=micro_tokens,
                                 teacher_prompt=HINT))
        student.zero_grad(set_to_none=True)
        rollout, total = found["rollout"], 0.0
        rows = {row["prompt"]: row for row in load_jsonl(HERE / "chains/train.jsonl")}
        for i in range(7):
            response, prompt = rollout.response(i), rollout.tokens[i, : rollout.prompt_lens[i]].tolist()
            row = rows[pair.tokenizer.decode(prompt)]
            ids = pair.tokenizer.encode_prompt(row["answer"] + "\n" + row["prompt"])  # written out once more
            log_p, log_q = (
                (m(torch.tensor([before + response]))[0, len(before) - 1 : -1] @ m.head[:644].T).log_softmax(-1)
                for m, before in ((student, prompt), (teacher, ids)))
            total = total + (log_p.exp() * (log_p - log_q)).sum()
        (total / rollout.num_supervised()).backward()
        for g, p in zip(found["gradient"], student.parameters()):
            assert torch.allclose(g, p.grad, rtol=1e-6, atol=1e-10)
        student.zero_grad(set_to_none=True)


def relevant(prompt: str) -> str:
    """A problem without the definitions that nobody needs."""
    *lines, question = prompt.strip().split("\n")
    defined, needed, name = {line.split("=")[0]: line for line in lines}, [], question.rstrip("?")
    while name in defined:
        needed.append(defined[name])
        name = re.split("[=+-]", defined[name])[1]
    return "\n".join([line for line in lines if line in needed] + [question]) + "\n"


def test_a_model_that_is_its_own_teacher_learns_from_what_only_the_teacher_is_shown(tmp_path):
    """The weak model, which is misled by needless definitions, reads the problem without them as the teacher."""
    data, runs = tmp_path / "rows.jsonl", {}
    rows = [{**row, "core": relevant(row["prompt"])} for row in load_jsonl(HERE / "chains/train.jsonl")[:300]]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, template in (("plain", ""), ("shown", "{core}")):
        run(*TINY, *BLIND, "--data", data, "--student", STUDENT, "--teacher", STUDENT, "--prefix_len", "8",
            "--lr", "1e-3", "--batch_size", "16", "--steps", "16", "--teacher_prompt", template,
            "--out_dir", tmp_path / name)
        runs[name] = log(tmp_path / name)
    assert max(r["kl"] for r in runs["plain"]) < 1e-6 and runs["plain"][0]["grad_norm"] < 1e-6
    kl = [r["kl"] for r in runs["shown"]]
    assert runs["shown"][0]["grad_norm"] > 0.1 and sum(kl[8:]) / 8 < 0.8 * sum(kl[:4]) / 4


def test_the_teacher_writes_behind_its_own_prompt_and_the_student_learns_behind_its_own(tmp_path):
    pair = make_pair(*(Transformer.from_pretrained(f) for f in (STUDENT, TEACHER)))
    rows = load_jsonl(HERE / "chains/train.jsonl")[:5]
    encode_prompts(rows, pair.tokenizer, 644, "--data", HINT, pair.teacher_tokenizer)
    config = train.Config(prefix_len=30, rollout="teacher", teacher_prompt=HINT)
    rollout = train.respond(rows, 0, 30, config, pair)
    seeds = torch.randint(2**63 - 1, (5,), generator=torch.Generator().manual_seed(1337 + 104729)).tolist()
    alone = generate(pair.teacher, [row["teacher_ids"] for row in rows], 30, pair.stop_ids, seeds=seeds)
    for i, row in enumerate(rows):
        assert rollout.response(i) == alone.response(i) == rollout.for_teacher.response(i)
        assert rollout.tokens[i, : rollout.prompt_lens[i]].tolist() == row["prompt_ids"] != row["teacher_ids"]
        assert rollout.for_teacher.tokens[i, : rollout.for_teacher.prompt_lens[i]].tolist() == row["teacher_ids"]
    flops = train.step_flops(pair, rollout, config)
    rollout.for_teacher = rollout
    assert flops["flop_teacher"] > train.step_flops(pair, rollout, config)["flop_teacher"]


def test_a_template_is_part_of_the_run_and_is_resumed(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(*TINY, "--eval_problems", "4", "--teacher_prompt", HINT, "--save_every", "2", "--out_dir", whole)
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "step_000003")
    run("--resume", "--out_dir", cut)
    assert log(whole) == log(cut)
    with pytest.raises(InputError, match="--teacher_prompt is '{prompt}' and was"):
        run("--resume", "--out_dir", cut, "--teacher_prompt", "{prompt}")


def test_the_preflight_shows_both_prompts_and_does_not_warn_of_what_was_asked_for(tmp_path, capsys):
    run(*TINY, *BLIND, "--steps", "1", "--teacher_prompt", HINT, "--out_dir", tmp_path)
    said = capsys.readouterr().out
    assert "prompt as the student sees it: 'Mia=Quy+3\\n" in said and "WARNING" not in said
    rows = load_jsonl(HERE / "chains/train.jsonl")
    answer = next(r["answer"] for r in rows if r["prompt"].startswith("Mia=Quy+3\nZed"))
    assert f"prompt as the teacher sees it: '{answer}\\nMia=Quy+3\\n" in said


@pytest.mark.parametrize("template, message", [
    ("{hint}\n{prompt}", "--teacher_prompt: row 1 of --data has no text 'hint', only prompt, answer"),
    ("Think first.", "--teacher_prompt 'Think first.': expected the name of a row's field in it"),
    ("{prompt}" * 400, "exceed the 8192 positions of the model"),
])
def test_templates_that_cannot_be_used_are_one_line_before_anything_is_trained(tmp_path, template, message):
    rows = (HERE / "chains/train.jsonl").read_text().splitlines(keepends=True)[:8]
    (tmp_path / "rows.jsonl").write_text("".join(rows))
    with pytest.raises(InputError) as refused:
        run(*TINY, *BLIND, "--data", tmp_path / "rows.jsonl", "--student", STUDENT, "--teacher", TEACHER,
            "--teacher_prompt", template, "--out_dir", tmp_path / "out")
    assert message in str(refused.value) and "\n" not in str(refused.value)
    assert not list((tmp_path / "out").glob("step_*"))


def test_braces_of_a_rows_own_text_stay():
    tokenizer = Tokenizer(STUDENT)
    rows = [{"prompt": "Dan=5\n", "answer": "{prompt} \\boxed{}"}]
    encode_prompts(rows, tokenizer, 644, "--data", "{answer}\n{prompt}{}", tokenizer)
    assert tokenizer.decode(rows[0]["teacher_ids"]) == "{prompt} \\boxed{}\nDan=5\n{}"


def test_data_may_bring_the_template_which_held_out_problems_follow_and_the_flag_overrides(tmp_path):
    rows = load_jsonl(HERE / "chains/train.jsonl")[:8]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row | {"teacher_prompt": HINT}) + "\n" for row in rows))
    (tmp_path / "null.jsonl").write_text("".join(json.dumps(row | {"teacher_prompt": None}) + "\n" for row in rows))
    for name, template in ("own", ""), ("null", HINT), ("own", "{prompt}"), ("null", ""):  # null: a table's empty cell
        run(*TINY, "--steps", "1", "--data", tmp_path / f"{name}.jsonl", "--student", STUDENT, "--teacher", TEACHER,
            "--eval_data", "chains", "--teacher_prompt", template, "--out_dir", tmp_path / f"{name}{len(template)}")
    assert log(tmp_path / "own0") == log(tmp_path / f"null{len(HINT)}") != log(tmp_path / "null0")
    assert log(tmp_path / "null0") == log(tmp_path / f"own{len('{prompt}')}")


def test_responses_stay_themselves_behind_other_prompts():
    rollout = Rollout.of([[1, 2], [3]], [[4, 5, 6], [7]], (6,))
    rollout.supervised = torch.tensor([[1, 3], [0, 1]])
    seen = rollout.with_prompts([[9], [8, 8, 8, 8]])
    for rows in rollout.micro_batches(100):
        _, _, targets, position = rollout.part(rows, "cpu")
        _, _, targets_seen, position_seen = seen.part(rows, "cpu")
        assert torch.equal(targets, targets_seen) and torch.equal(position, position_seen)
    assert json.dumps(seen.tokens.tolist()) == "[[9, 4, 5, 6, 0], [8, 8, 8, 8, 7]]" and math.isfinite(seen.flop)


# --- of another family: transformers builds it, and it scores

MOE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "decoder_sparse_step": 1}
OTHERS = {
    "qwen3_moe": MOE, "olmo2": {}, "olmo3": {"sliding_window": 8}, "mistral": {"sliding_window": 8},
    "gemma3_text": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
}


def other_teacher(folder: Path, kind: str, **more) -> Path:
    """A random teacher of a kind, with the embedded tokenizer, in `folder`."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind, vocab_size=704, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=512, initializer_range=0.2,
        **{"bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0, **OTHERS.get(kind, {}), **more})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TEACHER / name, folder)
    return folder


@pytest.mark.parametrize("kind", OTHERS)
def test_a_teacher_of_another_family_scores_as_in_transformers(tmp_path, kind):
    """On rows of several lengths, padded on the right; longer than a sliding window."""
    folder = other_teacher(tmp_path, kind)
    teacher, reference = load_teacher(folder, torch.device("cpu"), 644), AutoModelForCausalLM.from_pretrained(folder)
    rows = [torch.randint(600, (n,), generator=torch.Generator().manual_seed(n)) for n in (30, 11, 5)]
    hidden = teacher(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True))
    for found, row in zip(hidden, rows):
        expected = reference(row[None]).logits[0]
        assert torch.allclose(found[: len(row)] @ teacher.head.T, expected, rtol=1e-4, atol=1e-4)


def test_code_that_a_teacher_of_another_family_names_is_not_executed(tmp_path, monkeypatch):
    folder = other_teacher(tmp_path / "teacher", "olmo2")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\nclass Evil: pass\n")
    config = json.loads((folder / "config.json").read_text()) | {"auto_map": {"AutoModelForCausalLM": "evil.Evil"}}
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    load_teacher(folder, torch.device("cpu"), 644)
    assert not (tmp_path / "executed").exists()


def test_a_run_with_a_mixture_of_experts_as_teacher(tmp_path):
    teacher, out = other_teacher(tmp_path / "teacher", "qwen3_moe"), tmp_path / "out"
    run(*TINY, "--teacher", teacher, "--max_new_tokens", "30", "--out_dir", out)
    assert all(r["kl"] > 0 and r["flop_teacher"] > 0 for r in read_log(out / "log.jsonl") if "loss" in r)
    run("--resume", "--steps", "4", "--out_dir", out)
    for flags in (("--mix", "0.5"), ("--rollout", "teacher")):
        with pytest.raises(InputError, match="'qwen3_moe' is not supported .* but for a teacher that only scores"):
            run(*TINY, *BLIND, *flags, "--teacher", teacher, "--out_dir", out, "--overwrite")
    assert len(checkpoints(out)) == 2  # it was refused before anything was discarded
    for flags in (("--mix", "0.5"), ("--rollout", "teacher"), ("--shard", "2", "--world", "2", "--shard_teacher")):
        with pytest.raises(InputError, match="'qwen3_moe' is not supported .* but for a teacher that only scores"):
            run(*TINY, "--plan", *flags, "--teacher", teacher)


def test_flop_of_experts_are_those_that_a_token_meets(tmp_path):
    config = AutoConfig.from_pretrained(other_teacher(tmp_path, "qwen3_moe"))
    attention, router, experts = 2 * 32 * (4 + 2) * 8, 32 * 8, 8 * 3 * 32 * 24
    weights = 2 * (attention + router + experts * 2 / 8)
    expected = 2 * weights * 10 + 4 * 2 * 32 * 55 + 2 * 32 * 704 * 3
    assert count_flops(config, torch.tensor([10]), 3) == pytest.approx(expected)
    assert count_parameters(config) > weights


@pytest.mark.parametrize("kind, more, message", [
    ("granite", {"logits_scaling": 8.0}, "its logits_scaling changes its logits"),
    ("gemma3_text", {"final_logit_softcapping": 30.0}, "its final_logit_softcapping changes its logits"),
    ("phi", {}, "the logits of a phi model are not its head times its last hidden state"),
])
def test_a_teacher_that_changes_its_logits_is_refused_by_name(tmp_path, kind, more, message):
    other_teacher(tmp_path, kind, **more)
    if kind == "phi":  # whose head has a bias
        weights = load_file(tmp_path / "model.safetensors")
        weights["lm_head.bias"] += torch.arange(704.0)
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=message):
        load_teacher(tmp_path, torch.device("cpu"), 644)
