import contextlib
import json
import math
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import data.run as run_folder
import train
from data import HERE, InputError, load_jsonl, prefix
from data.books import count_flops, flop_books, predicted_memory, room_for_slots
from data.tokenizer import Tokenizer
from eval import by_position
from model import Transformer
from sample import Rollout, generate

ROOT = Path(train.__file__).parent
STUDENT, TEACHER = HERE / "chains/student", HERE / "chains/teacher"
TINY = ["--steps", "3", "--batch_size", "6", "--micro_batch", "4", "--prefix_len", "20", "--eval_problems", "8",
        "--max_new_tokens", "60"]


def run(*command: str, cwd=ROOT) -> subprocess.CompletedProcess:
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)


# --- the gradient of a step


@pytest.fixture(scope="module")
def step():
    """A rollout of the embedded student, in float64, with rows cut at the cap and rows that ended."""
    student, teacher = (Transformer.from_pretrained(f, dtype=torch.float64) for f in (STUDENT, TEACHER))
    tokenizer = Tokenizer(STUDENT)
    prompts = [tokenizer.encode_prompt(r["prompt"]) for r in load_jsonl(HERE / "chains/train.jsonl")[:10]]
    generator = torch.Generator().manual_seed(0)
    rollout = generate(student, prompts, 40, tokenizer.stop_ids, generator=generator, vocab=tokenizer.vocab_size)
    return student, teacher.requires_grad_(False), rollout, tokenizer


def gradient(step, **flags):
    student, teacher, rollout, tokenizer = step
    student.zero_grad(set_to_none=True)
    stats = train.train_on(
        rollout, student, teacher, train.Config(dtype="float32", **{"micro_batch": 16, **flags}),
        tokenizer.vocab_size, tokenizer.stop_ids, contextlib.nullcontext, {"teacher": 0.0, "student": 0.0},
    )
    return {name: p.grad.clone() for name, p in student.named_parameters()}, stats


def test_micro_batches_do_not_change_the_gradient(step):
    whole, stats = gradient(step, micro_batch=10)
    for micro_batch in (1, 3):
        parts, _ = gradient(step, micro_batch=micro_batch)
        for name in whole:
            assert torch.allclose(whole[name], parts[name], rtol=1e-8, atol=1e-12), name
    assert len(stats["kl"]) == int(step[2].lens.sum())


def test_the_gradient_is_that_of_the_definition(step):
    """One row at a time, no padding, logits of every position, the divergence from its definition, autograd."""
    student, teacher, rollout, tokenizer = step
    found, stats = gradient(step)
    student.zero_grad(set_to_none=True)
    total = 0.0
    for i, (start, n) in enumerate(zip(rollout.prompt_lens.tolist(), rollout.lens.tolist())):
        tokens = rollout.tokens[i : i + 1, : start + n]
        log_p, log_q = (
            (m(tokens) @ m.head[: tokenizer.vocab_size].T).log_softmax(-1)[0, start - 1 : start + n - 1]
            for m in (student, teacher)
        )
        total = total + (log_p.exp() * (log_p - log_q)).sum()
    loss = total / rollout.lens.sum()
    loss.backward()
    assert abs(stats["loss"].mean() - loss) < 1e-9
    for name, p in student.named_parameters():
        assert torch.allclose(p.grad, found[name], rtol=1e-6, atol=1e-10), name


def test_student_equal_to_teacher_learns_nothing(step):
    teacher = step[1]
    twin = Transformer.from_pretrained(TEACHER, dtype=torch.float64)
    found, stats = gradient((twin, teacher, *step[2:]))
    assert stats["kl"].abs().max() < 1e-12
    assert max(g.abs().max() for g in found.values()) < 1e-12


def test_padding_rows_of_either_head_change_nothing(step):
    """Same tokenizer, heads padded to different sizes, and what is in the padding is wild."""
    student, teacher, rollout, tokenizer = step
    expected, stats = gradient(step)
    wide = []
    for model, rows in ((student, 30), (teacher, 75)):
        copy = Transformer(
            model.config.__class__.from_dict(model.config.to_dict() | {"vocab_size": model.head.shape[0] + rows})
        )
        weights = dict(model.state_dict())
        padding = 100 * torch.randn(rows, model.config.hidden_size, generator=torch.Generator().manual_seed(0)).double()
        weights["model.embed_tokens.weight"] = torch.cat([model.head.detach(), padding])
        copy.double().load_state_dict(weights)
        wide.append(copy)
    found, wide_stats = gradient((wide[0], wide[1].requires_grad_(False), rollout, tokenizer))
    assert torch.allclose(stats["kl"], wide_stats["kl"], atol=1e-12)
    for name, g in expected.items():
        assert torch.allclose(found[name][: len(g)], g, rtol=1e-8, atol=1e-12), name
    assert not found["model.embed_tokens.weight"][len(expected["model.embed_tokens.weight"]) :].any()
    again = generate(
        wide[0], [rollout.tokens[i, : rollout.prompt_lens[i]].tolist() for i in range(10)], 40, tokenizer.stop_ids,
        generator=torch.Generator().manual_seed(0), vocab=tokenizer.vocab_size,
    )
    assert torch.equal(again.tokens, rollout.tokens)


def test_half_precision_weights_do_not_move_at_small_rates():
    """Why the student's weights are float32 under the optimizer: bfloat16 has 8 bits, and Adam's step is about lr."""
    moved = {}
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.full((4,), 0.05, dtype=dtype, requires_grad=True)
        optimizer = torch.optim.AdamW([weight], lr=1e-6, weight_decay=0.0)
        before = weight.detach().clone()
        for _ in range(100):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        moved[dtype] = (before - weight.detach()).float().abs().max().item()
    assert moved[torch.bfloat16] == 0 and math.isclose(moved[torch.float32], 1e-4, rel_tol=0.01)


def test_positions_count_from_the_first_response_token(step):
    _, stats = gradient(step)
    counts = torch.bincount(stats["position"])
    lens = step[2].lens
    assert counts.tolist() == [int((lens > i).sum()) for i in range(int(lens.max()))]
    curve = by_position(stats["kl"], stats["position"])
    assert list(curve) == ["0", "1", "2", "4", "8", "16", "32"]
    assert math.isclose(
        curve["2"], stats["kl"][(stats["position"] == 2) | (stats["position"] == 3)].mean(), rel_tol=1e-9
    )


def test_planned_prefixes():
    def plan(**flags):
        config = train.Config(prefix_start=10, prefix_len=110, steps=11, stair=25, **flags)
        return [prefix.planned_prefix(step, config) for step in range(13)]

    assert plan() == [110] * 13
    assert plan(schedule="linear") == [10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110, 110, 110]
    assert plan(schedule="linear", schedule_steps=3) == [10, 60] + [110] * 11
    assert plan(schedule="staircase") == [10, 10, 10, 35, 35, 60, 60, 60, 85, 85, 110, 110, 110]
    assert plan(schedule="linear", schedule_steps=1)[1:] == [110] * 12
    assert plan(full_every=4, max_new_tokens=300) == [110, 110, 110, 300] * 3 + [110]
    assert plan(schedule="adaptive") == [0] * 13  # what it has grown to is told by the caller


def test_the_adaptive_prefix_grows_when_its_edge_is_learnt_and_reached():
    config = train.Config(prefix_start=8, prefix_len=20, schedule="adaptive")
    position = torch.arange(8)

    def follow(edges, reached=1.0):
        state, seen = {"prefix_len": 8, "smooth": None, "lowest": None, "waited": 0}, []
        for edge in edges:
            kl = torch.where(position < 4, 100.0, edge)  # what happens before the last half does not count
            state = prefix.adapted_prefix(state, kl, position, reached, config)
            seen.append(state["prefix_len"])
        return seen

    assert follow([0.8**i for i in range(10)]) == [8] * 10  # still falling
    assert follow([0.5**i for i in range(5)]) == [8, 8, 8, 8, 12]  # down to a tenth
    assert follow([1.0] * 4) == [8, 8, 8, 12]  # three steps without a fall
    assert follow([1.0] * 12, reached=0.2) == [8] * 12  # responses end before
    assert follow([1.0] * 20)[-1] <= 20
    state = {"prefix_len": 8, "smooth": 1.0, "first": 1.0, "lowest": 1.0, "waited": 2}
    short = prefix.adapted_prefix(state, torch.ones(2), torch.tensor([0, 1]), 1.0, config)
    assert short == state  # nothing was said in the last half: nothing to judge by


def test_a_learnt_prefix_that_is_trained_on_is_warned_of():
    config = train.Config(prefix_len=16)
    assert "the first 16 tokens are learnt (KL 0.080" in prefix.drift_warning(0.08, 3.0, 0.1, config)
    assert not prefix.drift_warning(0.5, 3.0, 0.1, config)  # not learnt yet
    assert not prefix.drift_warning(0.08, 3.0, 0.9, config)  # most responses end before the cut
    assert not prefix.drift_warning(0.08, 3.0, 0.1, replace(config, schedule="linear"))
    assert not prefix.drift_warning(0.08, 3.0, 0.1, replace(config, window="first"))
    assert not prefix.drift_warning(0.08, 3.0, 0.1, replace(config, full_every=5))
    assert not prefix.drift_warning(0.0, 0.0, 0.0, config)  # no teacher


@pytest.mark.parametrize("window", ["first", "last", "random"])
def test_a_window_supervises_its_tokens_and_no_others(step, window):
    """Gradient and count against a loss written for one row and one position at a time."""
    student, teacher, rollout, tokenizer = step
    windowed = replace(rollout)
    prefix.supervise_window(windowed, 7, window, torch.Generator().manual_seed(3))
    spans = windowed.spans().tolist()
    for (start, end), n in zip(spans, rollout.lens.tolist()):
        assert end - start == min(7, n) and 0 <= start <= end <= n
        assert window != "first" or start == 0
        assert window != "last" or end == n
    found, stats = gradient((student, teacher, windowed, tokenizer), micro_batch=3)
    assert len(stats["kl"]) == sum(end - start for start, end in spans)
    student.zero_grad(set_to_none=True)
    total = 0.0
    stops = list(tokenizer.stop_ids)
    assert len(stops) < 2  # else they would have to be merged here
    for i, (start, end) in enumerate(spans):
        p = int(rollout.prompt_lens[i])
        row = rollout.tokens[i : i + 1, : p + end]
        log_p = (student(row)[0] @ student.head.T)[:, : tokenizer.vocab_size].log_softmax(-1)
        log_q = (teacher(row)[0] @ teacher.head.T)[:, : tokenizer.vocab_size].log_softmax(-1)
        for j in range(start, end):
            total = total + (log_p[p + j - 1].exp() * (log_p[p + j - 1] - log_q[p + j - 1])).sum()
    (total / len(stats["kl"])).backward()
    for name, p in student.named_parameters():
        assert torch.allclose(found[name], p.grad, atol=1e-10), name


def test_what_follows_the_window_costs_nothing(step):
    student, teacher, rollout, _ = step
    windowed = replace(rollout)
    prefix.supervise_window(windowed, 7, "first", torch.Generator())
    assert max(tokens.shape[1] for tokens, _, _ in windowed.micro_batches(4)) == int(rollout.prompt_lens.max()) + 7
    whole, part = (flop_books(r, student.config, teacher.config) for r in (rollout, windowed))
    assert part["flop_student"] < whole["flop_student"]


@pytest.mark.parametrize("flags", [
    ("--schedule", "linear", "--prefix_start", "4"),
    ("--schedule", "adaptive", "--prefix_start", "4"),
    ("--window", "random"),
    ("--full_every", "2"),
    ("--full_every", "2", "--schedule", "adaptive", "--prefix_start", "4"),
])
def test_growing_and_windowed_runs_resume_where_they_were(flags, tmp_path):
    flags = (*TINY, *flags, "--schedule_steps", "3", "--eval_problems", "0", "--eval_kl", "0", "--max_new_tokens", "40")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for command in (("--out_dir", whole), ("--out_dir", cut, "--steps", "2"), ("--out_dir", cut, "--resume")):
        result = run("train.py", *flags, *command)
        assert result.returncode == 0, result.stderr
    assert comparable(whole) == comparable(cut)
    lengths = [r["prefix_len"] for r in records(whole)]
    usual = [4, 12, 20] if "linear" in flags else [4] * 3 if "adaptive" in flags else [20] * 3
    assert lengths == ([usual[0], 40, usual[2]] if "--full_every" in flags else usual)
    if "--full_every" in flags:  # nothing is cut in the second step, of which the adaptive schedule takes no notice
        assert [r["response_len"] > 20 for r in records(whole)] == [False, True, False]
        growth = [json.loads((folder / "state.json").read_text())["growth"] for folder in sorted(whole.glob("step_*"))]
        assert "adaptive" not in flags or growth[-1]["waited"] == 1  # after three steps, two of them short
    if "random" in flags:
        assert all(r["tokens"] <= 6 * 20 < r["response_len"] * 6 for r in records(whole))


def respond(step, rows: list[dict], prefix_len: int, cache=None, **flags):
    student, teacher, _, tokenizer = step
    config = train.Config(prefix_len=prefix_len, dtype="float32", **flags)
    return train.respond(rows, 0, prefix_len, config, student, teacher, tokenizer, tokenizer.stop_ids,
                         tokenizer.vocab_size, torch.Generator().manual_seed(5), cache)  # fmt: skip


@pytest.fixture(scope="module")
def problems(step):
    rows = load_jsonl(HERE / "chains/train.jsonl")[:6]
    for row in rows:
        row["prompt_ids"] = step[3].encode_prompt(row["prompt"])
    return rows


def test_no_stop_is_invented_at_the_cut(step):
    rows = [{"prompt_ids": [5, 6], "solution_ids": [7, 8, 9]}, {"prompt_ids": [5], "solution_ids": [7]}]
    rollout, wrote = respond(step, rows, 3, rollout="data")
    assert rollout.response(0) == [7, 8, 9] and rollout.response(1) == [7, 2]
    assert rollout.finished.tolist() == [False, True]
    assert rollout.spans().tolist() == [[0, 3], [0, 2]]
    assert wrote == {"sampled": 0, "flop_sample": 0.0}


def test_mix_takes_a_share_of_the_rows_from_the_teacher(step, problems):
    rollout, wrote = respond(step, problems, 30, mix=0.5, max_new_tokens=200)
    student, teacher, _, tokenizer = step
    prompts = [row["prompt_ids"] for row in problems]
    g = torch.Generator().manual_seed(5)
    theirs = generate(teacher, prompts[:3], 200, tokenizer.stop_ids, generator=g, vocab=tokenizer.vocab_size)
    assert int(theirs.lens.max()) > 30  # whole, where the student's are cut
    ours = generate(student, prompts, 30, tokenizer.stop_ids, generator=g, vocab=tokenizer.vocab_size)
    assert [rollout.response(i) for i in range(6)] == [(theirs if i < 3 else ours).response(i) for i in range(6)]
    assert rollout.spans().tolist() == [[0, n] for n in rollout.lens]  # the teacher's words are learned from too
    assert wrote["sampled"] == int(rollout.lens.sum())
    alone, _ = respond(step, problems, 30, rollout="teacher")
    assert [alone.response(i) for i in range(3)] == [theirs.response(i)[:30] for i in range(3)]


def test_a_teacher_prefix_starts_the_response_and_is_not_supervised(step, problems):
    rollout, wrote = respond(step, problems, 30, teacher_prefix=7)
    _, teacher, _, tokenizer = step
    prompts = [row["prompt_ids"] for row in problems]
    g = torch.Generator().manual_seed(5)
    theirs = generate(teacher, prompts, 7, tokenizer.stop_ids, generator=g, vocab=tokenizer.vocab_size)
    assert all(rollout.response(i)[:7] == theirs.response(i) for i in range(6))
    assert rollout.spans().tolist() == [[7, n] for n in rollout.lens] and int(rollout.lens.max()) == 30
    assert wrote["sampled"] == int(rollout.lens.sum())  # by both


def test_the_teachers_responses_come_from_the_cache(step, problems, tmp_path):
    config = train.Config(teacher_cache=str(tmp_path / "cache.jsonl"), prefix_len=40)
    first, wrote = respond(step, problems[:4], 40, run_folder.ResponseCache(config, (2,)), rollout="teacher")
    assert wrote["sampled"] == int(first.lens.sum()) > 0
    with open(config.teacher_cache, "a") as file:
        file.write('{"prompt": "torn')
    cache = run_folder.ResponseCache(config, (2,))
    again, wrote = respond(step, problems[:4], 40, cache, rollout="teacher")
    assert torch.equal(first.tokens, again.tokens) and wrote == {"sampled": 0, "flop_sample": 0.0}
    shorter, _ = respond(step, problems[:4], 9, cache, rollout="teacher")  # an earlier step of a growing prefix
    assert [shorter.response(i) for i in range(4)] == [first.response(i)[:9] for i in range(4)]
    respond(step, problems, 40, cache, rollout="teacher")
    assert len(Path(config.teacher_cache).read_text().splitlines()) == 7  # the header, four rows, two more
    with pytest.raises(InputError, match="was made with temperature 1.0, this run has 0.7"):
        run_folder.ResponseCache(replace(config, temperature=0.7), (2,))


def test_a_resumed_run_pays_again_for_what_it_had_cached_after_its_checkpoint(step, problems, tmp_path):
    config = train.Config(teacher_cache=str(tmp_path / "cache.jsonl"), prefix_len=40)
    cache = run_folder.ResponseCache(config, (2,))
    for i in range(3):  # steps 1, 2, 3, the last after the checkpoint
        cache.add(problems[i]["prompt_ids"], [7, 8, i], i)
    assert len(run_folder.ResponseCache(config, (2,), first_step=2).responses) == 2
    cache.add(problems[2]["prompt_ids"], [7, 8, 2], 2)
    other = replace(config, out_dir="another")
    assert len(run_folder.ResponseCache(other, (2,), first_step=1).responses) == 3  # another run's stay


def test_a_file_of_another_kind_is_not_written_over(tmp_path):
    file = tmp_path / "mine.jsonl"
    for text in ('{\n "a": 1\n}\n', "# Notes\n", '{"a": 1}\n', "[1]\n", "\u00e9".encode("latin-1")):
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        before = file.read_bytes()
        with pytest.raises(InputError, match="holds something else than responses"):
            run_folder.ResponseCache(train.Config(teacher_cache=str(file)), (2,))
        assert file.read_bytes() == before


def test_iw_weights_are_the_definition(step):
    rollout = step[2]
    plain, stats = gradient(step, micro_batch=10)
    weighted, weighted_stats = gradient(step, micro_batch=3, iw_gamma=0.5)
    ratio = (stats["student_logprob"] - stats["teacher_logprob"]).abs()
    order = (rollout.prompt_lens + rollout.lens).argsort(descending=True, stable=True)  # as micro_batches goes
    weights = []
    for d in ratio.split(rollout.lens[order].tolist()):
        weights += [1 + 0.5 * (1 - float(d[:t].sum() / d.sum())) for t in range(len(d))]
    weights = torch.tensor(weights, dtype=torch.float64)
    assert weights.min() >= 1 and weights.max() == 1.5
    assert torch.allclose(weighted_stats["loss"], stats["kl"] * weights, rtol=1e-9, atol=1e-12)
    # The gradient is weighted too: with all the weight on one token's row it would be that row's.
    assert not torch.allclose(weighted["model.norm.weight"], plain["model.norm.weight"], rtol=0.01)


def test_every_epoch_sees_every_row_once():
    rows, config = list(range(10)), train.Config(batch_size=4, seed=3)
    seen = [r for s in range(5) for r in train.batch_of(rows, s, config)]
    assert sorted(seen[:10]) == rows and sorted(seen[10:20]) == rows and seen[:10] != seen[10:20]
    assert train.batch_of(rows, 2, config) == seen[8:12]
    assert train.batch_of(rows, 2, replace(config, seed=4)) != seen[8:12]


def test_flop_books_follow_the_tokens(step):
    student, teacher, rollout, _ = step
    books = flop_books(rollout, student.config, teacher.config)
    alone = Rollout(
        rollout.tokens[:1], rollout.prompt_lens[:1], rollout.lens[:1], rollout.finished[:1], rollout.logprobs, 0
    )
    n, p = int(rollout.lens[0]), int(rollout.prompt_lens[0])
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        teacher(rollout.tokens[:1, : p + n - 1])[:, -n:] @ teacher.head.T
    one = flop_books(alone, student.config, teacher.config)["flop_teacher"]
    t, c = p + n - 1, teacher.config  # torch counts all T x T pairs, the books the T(T+1)/2 attended ones
    assert (
        one
        == counter.get_total_flops() - 4 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * t * (t - 1) / 2
    )
    assert books["flop_student"] > books["flop_teacher"] > 0


# --- the commands, as a user runs them


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    result = run("train.py", *TINY, "--out_dir", out)
    assert result.returncode == 0, result.stderr
    return out, result


def records(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def comparable(out: Path) -> list[dict]:
    """The log without what a clock or the operating system says."""
    def clock(key):
        return "second" in key or "per_s" in key or key in ("peak_memory", "matmul_share")

    return [{k: v for k, v in r.items() if not clock(k)} for r in records(out)]


def test_train_prints_and_logs_what_the_readme_promises(finished_run):
    out, result = finished_run
    for text in (
        "greedy accuracy",
        "sampled accuracy",
        "student, greedy",
        "teacher, greedy",
        "seconds: sample",
        "checkpoint",
        "KL/token",
        "tok/s",
    ):
        assert text in result.stdout + result.stderr
    steps = [r for r in records(out) if "loss" in r]
    assert [r["step"] for r in steps] == [1, 2, 3]
    readme = (ROOT / "README.md").read_text()
    for key in steps[0]:
        assert f"`{key}`" in readme, f"the glossary of README.md lacks {key}"
    assert all(r["kl"] >= 0 and r["response_len"] <= 20 for r in steps)
    assert steps[-1]["total_tokens_trained"] == sum(r["tokens"] for r in steps)


def test_the_same_command_gives_the_same_log(finished_run, tmp_path):
    assert run("train.py", *TINY, "--out_dir", tmp_path / "again").returncode == 0
    assert comparable(tmp_path / "again") == comparable(finished_run[0])


def test_a_resumed_run_equals_one_left_alone(finished_run, tmp_path):
    out = tmp_path / "cut"
    assert run("train.py", *TINY, "--out_dir", out, "--steps", "2", "--eval_problems", "8").returncode == 0
    result = run("train.py", *TINY, "--out_dir", out, "--resume")
    assert result.returncode == 0, result.stderr
    last = [[r for r in comparable(o) if "loss" in r][-1] for o in (out, finished_run[0])]
    assert last[0] == last[1]
    a, b = (load_file(o / "step_000003/model.safetensors") for o in (out, finished_run[0]))
    assert all(torch.equal(a[name], b[name]) for name in a)
    more = run("train.py", "--out_dir", out, "--resume", "--steps", "4", "--eval_every", "3")  # the rest is as it was
    assert more.returncode == 0, more.stderr
    assert records(out)[-1]["step"] == 4 and any(r["step"] == 3 and "eval" in r for r in records(out))
    changed = run("train.py", *TINY, "--out_dir", out, "--resume", "--lr", "1e-3")
    assert changed.returncode == 2 and "--lr is 0.001 and was 0.0005. Only these may change: --" in changed.stderr


def test_a_run_killed_at_any_moment_resumes_to_the_same_end(tmp_path):
    """Twice with SIGKILL, once of these inside a save; once with Ctrl-C; against a run left alone."""
    flags = ["train.py", *TINY, "--eval_problems", "0", "--eval_kl", "0", "--steps", "9", "--save_every", "1",
             "--schedule", "adaptive", "--prefix_start", "4"]
    left_alone, out = tmp_path / "alone", tmp_path / "killed"
    assert run(*flags, "--out_dir", left_alone).returncode == 0
    delay = random.Random(7)

    def interrupt(number, moment, *more) -> int:
        command = [sys.executable, *map(str, (*flags, "--out_dir", out, *more))]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            begin = time.monotonic()
            while not moment() and process.poll() is None and time.monotonic() < begin + 120:
                time.sleep(0.0005)
            assert process.poll() is None, "it ended before it could be killed"
            process.send_signal(number)
            output = process.communicate()[0].decode()
            assert number != signal.SIGINT or "interrupted; go on with --resume" in output
            return process.returncode

    def step_of(least):
        return lambda: out.is_dir() and len(run_folder.checkpoints(out)) > 0 and (
            run_folder.checkpoints(out)[-1].name >= f"step_{least:06d}" and not time.sleep(delay.uniform(0, 0.1)))

    assert interrupt(signal.SIGKILL, step_of(2)) != 0
    in_a_save = lambda: any(f.name > ".step_000003" for f in out.glob(".step_*.incomplete"))
    assert interrupt(signal.SIGKILL, in_a_save, "--resume") != 0
    assert interrupt(signal.SIGINT, step_of(6), "--resume") == 0
    result = run(*flags, "--out_dir", out, "--resume")
    assert result.returncode == 0, result.stderr
    assert comparable(out) == comparable(left_alone) and len(comparable(out)) == 9
    assert len({r["prefix_len"] for r in comparable(out)}) > 1  # the adaptive schedule's state has come along
    for name in ("model.safetensors", "optimizer.safetensors"):
        a, b = (load_file(o / "step_000009" / name) for o in (out, left_alone))
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_what_is_not_finite_stops_the_run_with_a_diagnosis_and_a_state(step, tmp_path):
    blind = ("--eval_problems", "0", "--eval_kl", "0")
    result = run("train.py", *TINY, *blind, "--lr", "1e30", "--warmup", "0", "--out_dir", tmp_path / "out")
    assert result.returncode == 2
    last = result.stderr.splitlines()[-1]
    assert "step 2, the loss is finite, but not the gradient of model.embed_tokens.weight" in last
    assert "the state before this step is in" in last
    assert [f.name for f in run_folder.checkpoints(tmp_path / "out")] == ["step_000001"]
    assert run_folder.read_json(tmp_path / "out/step_000001/state.json")["step"] == 1

    student, teacher, _, tokenizer = step
    for name, broken in (("student", student), ("teacher", teacher)):
        weight = broken.model.norm.weight
        with torch.no_grad():
            kept = weight[3].item()
            weight[3] = math.nan
            found = generate(broken, [[5, 6]], 2, (2,), vocab=tokenizer.vocab_size)  # no crash, no invented id
            assert 0 <= found.tokens.min() and found.tokens.max() < tokenizer.vocab_size
        with pytest.raises(FloatingPointError, match="micro-batch 0: the loss is not finite at response positions .0, "
                           f".*not finite either: the {name}'s hidden states$"):  # fmt: skip
            gradient(step, micro_batch=4)
        with torch.no_grad():
            weight[3] = kept


def test_predicted_memory_is_what_a_run_takes(tmp_path):
    blind = ("--eval_problems", "0", "--eval_kl", "0")
    result = run("train.py", *blind, "--steps", "2", "--batch_size", "64", "--micro_batch", "64", "--prefix_len", "24",
                 "--out_dir", tmp_path / "out")  # fmt: skip
    assert result.returncode == 0, result.stderr
    found = re.search(r"memory: up to ([\d.]+) GB while sampling, ([\d.]+) while learning", result.stdout)
    peak = records(tmp_path / "out")[-1]["peak_memory"] / 1e9
    assert max(map(float, found.groups())) == pytest.approx(peak, rel=0.15)


def test_sampling_stays_within_the_memory_allowed():
    config = train.Config(batch_size=64, micro_batch=2, dtype="float32")
    student, teacher = (Transformer.from_pretrained(f).config for f in (STUDENT, TEACHER))
    parts = predicted_memory(config, student, teacher, 500, 2, process=10**8)[0]
    wanted = parts["KV cache"] + parts["logits of the new tokens"]
    rest = sum(parts.values()) - wanted
    assert room_for_slots(config, student, teacher, 500, 10**8, rest + wanted // 2) == wanted // 2
    assert room_for_slots(config, student, teacher, 500, 10**8, rest / 2) == wanted // 8


def test_wandb_gets_the_same_records(tmp_path, monkeypatch):
    (tmp_path / "wandb.py").write_text(
        "import json\ndef write(kind, **what):\n    open('seen.jsonl', 'a').write(json.dumps([kind, what]) + '\\n')\n"
        "def init(project, name, config):\n    write('init', project=project, name=name, lr=config['lr'])\n"
        "def log(record):\n    write('log', **record)\ndef finish():\n    write('finish')\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    result = run(ROOT / "train.py", *TINY, "--steps", "1", "--wandb_project", "p", "--out_dir", "o", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    seen = [json.loads(line) for line in (tmp_path / "seen.jsonl").read_text().splitlines()]
    assert seen[0] == ["init", {"project": "p", "name": "o", "lr": 5e-4}] and seen[-1] == ["finish", {}]
    step = next(what for kind, what in seen if "loss" in what)
    assert step == next(r for r in records(tmp_path / "o") if "loss" in r)
    assert any("student/greedy/accuracy" in what for _, what in seen)


def test_plan_needs_nothing_but_two_configurations(tmp_path):
    for name, folder in (("student", STUDENT), ("teacher", TEACHER)):
        (tmp_path / name).mkdir()
        shutil.copy(folder / "config.json", tmp_path / name)
    pair = ("--student", tmp_path / "student", "--teacher", tmp_path / "teacher")
    result = run("train.py", "--plan", *pair, "--prefix_len", "100", "--plan_lens", "40,3000", "--batch_size", "10")
    assert result.returncode == 0, result.stderr
    rows = [line.split() for line in result.stdout.splitlines() if line.endswith("x")]
    table = {int(r[0].replace(",", "")): [float(x.strip("x").replace(",", "")) for x in r[1:]] for r in rows}
    assert {100, 3000, 1500, 23} <= set(table) and table[3000][-1] == 1.0
    student, teacher = (Transformer.from_pretrained(f).config for f in (STUDENT, TEACHER))
    fed, heads = 139, 100  # tokens that a row feeds to each model, positions scored
    one = [count_flops(c, fed, fed * 140 / 2, heads) for c in (student, teacher, student)]
    expected = [10 * one[0] / 1e12, 10 * one[1] / 1e12, 30 * one[2] / 1e12]
    assert table[100][:3] == pytest.approx(expected, rel=1e-3)
    assert table[100][-1] == pytest.approx(table[3000][3] / table[100][3], abs=0.05)
    assert "548" in result.stdout.replace("547,936", "548") and "KV cache" in result.stdout
    assert "\nfits\n" in result.stdout and "hours" not in result.stdout
    sft = run("train.py", "--plan", *pair, "--rollout", "data", "--loss", "cross_entropy", "--memory", "0.1").stdout
    assert "no teacher" in sft and "does not fit: " in sft and "allowed (--memory)" in sft
    assert all(line.split()[1:3] == ["0", "0"] for line in sft.splitlines() if line.endswith("x"))
    wrong = run("train.py", "--plan", "--plan_lens", "many")
    assert wrong.returncode == 2 and "--plan_lens many: expected two numbers" in wrong.stderr


def test_a_kill_in_the_last_evaluation_loses_only_that(finished_run, tmp_path):
    out = tmp_path / "cut"
    shutil.copytree(finished_run[0], out)
    lines = (out / "log.jsonl").read_text().splitlines(keepends=True)
    final = [line for line in lines if json.loads(line).get("eval") == "student" and json.loads(line)["step"] == 3]
    assert lines[-len(final) :] == final
    (out / "log.jsonl").write_text("".join(lines[: -len(final)]) + final[0][:40])  # torn
    shutil.copytree(out / "step_000003", out / "step_best")  # none of ours: neither read nor deleted
    result = run("train.py", *TINY, "--out_dir", out, "--resume")
    assert result.returncode == 0 and "has its 3 steps already" in result.stdout, result.stderr
    assert comparable(out) == comparable(finished_run[0]) and (out / "step_best").is_dir()


def test_checkpoints_are_told_by_number(tmp_path):
    for name in ("step_000009", "step_1000000", "step_999999", "step_old", "step_000010"):
        (tmp_path / name).mkdir()
        if name != "step_000010":  # which lacks its state
            (tmp_path / name / "state.json").write_text("{}")
    assert [f.name for f in run_folder.checkpoints(tmp_path)] == ["step_000009", "step_999999", "step_1000000"]


def test_a_torn_optimizer_state_is_named(finished_run, tmp_path):
    shutil.copytree(finished_run[0], tmp_path / "cut")
    file = tmp_path / "cut/step_000003/optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    result = run("train.py", *TINY, "--out_dir", tmp_path / "cut", "--resume")
    assert result.returncode == 2 and "not a complete optimizer state" in result.stderr


def test_a_run_does_not_overwrite_the_student_it_starts_from(finished_run, tmp_path):
    shutil.copytree(finished_run[0], tmp_path / "out")
    student = tmp_path / "out/step_000003"
    result = run("train.py", *TINY, "--out_dir", tmp_path / "out", "--overwrite", "--student", student)
    assert result.returncode == 2 and "--overwrite would delete --student" in result.stderr and student.is_dir()


def test_the_saved_student_declares_the_stops_it_was_trained_with(tmp_path):
    result = run("train.py", *TINY, "--steps", "1", "--eval_problems", "0", "--eval_kl", "0", "--stop_tokens", "65",
                 "--out_dir", tmp_path / "out")  # fmt: skip
    assert result.returncode == 0, result.stderr
    saved = tmp_path / "out/step_000001"
    assert Tokenizer(saved).stop_ids == tuple(sorted({65, *Tokenizer(STUDENT).stop_ids}))
    assert 65 in AutoModelForCausalLM.from_pretrained(saved).generation_config.eos_token_id


def test_the_saved_student_reloads_in_transformers_with_the_same_logits(finished_run):
    folder = finished_run[0] / "step_000003"
    ours, theirs = Transformer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    ids = AutoTokenizer.from_pretrained(folder)("Dan=Hal-8\nHal=5\nDan?\n", return_tensors="pt").input_ids
    expected = theirs(ids).logits
    assert ((ours(ids) @ ours.head.T) - expected).norm() / expected.norm() < 1e-5


def test_sample_shows_both_models_side_by_side():
    result = run("sample.py", "--max_new_tokens", "150")
    assert result.returncode == 0, result.stderr
    assert all(text in result.stdout for text in ("--- chains/teacher\n", "--- chains/student\n", "####", " tok/s]"))
    own = run("sample.py", "--prompt", "Zed=Ivy+5\nDan=Hal-8\nIvy=31\nHal=Eve+3\nEve=14\nDan?\n", "--model", TEACHER)
    assert own.returncode == 0 and "#### 9" in own.stdout


def test_eval_prints_the_summary_and_keeps_every_response(tmp_path):
    result = run("eval.py", "--model", TEACHER, "--num_problems", "20", "--num_samples", "2", "--temperature", "1",
                 "--out", tmp_path / "e.json")
    assert result.returncode == 0, result.stderr
    for text in ("accuracy (95% interval)", "P(finish)", "if finished", "length: mean", "the cap", "pass@2"):
        assert text in result.stdout
    found = json.loads((tmp_path / "e.json").read_text())
    assert len(found["responses"]) == 40 and found["summaries"]["chains"]["accuracy"] > 0.9
    assert all("<|im_end|>" not in r["response"] for r in found["responses"] if r["finished"])


@pytest.mark.parametrize(
    "flags",
    [
        ("--rollout", "data", "--loss", "cross_entropy"),
        ("--rollout", "data", "--loss", "forward_kl"),
        ("--rollout", "teacher", "--loss", "topk_reverse_kl", "--top_k", "8"),
        ("--rollout", "teacher", "--loss", "cross_entropy"),
        ("--rollout", "student", "--loss", "jsd", "--beta", "0.3"),
        ("--rollout", "student", "--loss", "sampled_kl"),
        ("--init", "random", "--rollout", "data", "--loss", "cross_entropy"),
        ("--mix", "0.5", "--iw_gamma", "0.5"),
        ("--teacher_prefix", "5", "--recompute"),
        ("--dtype", "bfloat16", "--lr_schedule", "cosine", "--weight_decay", "0.1", "--temperature", "0.8"),
    ],
)
def test_other_sources_and_losses_run(flags, tmp_path):
    blind = ("--eval_problems", "0", "--eval_kl", "0")
    result = run("train.py", *TINY, *blind, "--steps", "2", *flags, "--out_dir", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert all(math.isfinite(r["loss"]) for r in records(tmp_path / "out"))


# --- bad input: one line, status 2


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    (folder / "text.jsonl").write_text('{"prompt": "a", "answer": "b"}\n{"prompt": "a"\n')
    (folder / "empty.jsonl").write_text('{"prompt": ""}\n')
    (folder / "good.jsonl").write_text('{"prompt": "a"}\n')
    (folder / "run/step_000003").mkdir(parents=True)
    (folder / "run/log.jsonl").write_text("")
    (folder / "used").mkdir()
    (folder / "used/log.jsonl").write_text("")
    shutil.copytree(TEACHER, folder / "other")
    spec = json.loads((folder / "other/tokenizer.json").read_text())
    vocab = spec["model"]["vocab"]
    (a, i), (b, j) = list(vocab.items())[300:302]
    vocab[a], vocab[b] = j, i
    (folder / "other/tokenizer.json").write_text(json.dumps(spec))
    shutil.copytree(TEACHER, folder / "torn")
    weights = load_file(TEACHER / "model.safetensors")
    save_file({k: v for k, v in weights.items() if k != "model.norm.weight"}, folder / "torn/model.safetensors")
    return folder


@pytest.mark.parametrize("command, message", [
    ("train.py --prefix_length 8", "unknown flag --prefix_length; did you mean --prefix_len?"),
    ("train.py --prefix_len=many", "--prefix_len: invalid int value: 'many'"),
    ("train.py --prefix_len", "--prefix_len: expected one argument"),
    ("train.py --prefix_len 0", "--prefix_len must be at least 1, found 0"),
    ("train.py --loss kl", "--loss kl: expected one of reverse_kl"),
    ("train.py --schedule linear --prefix_start 2000", "--prefix_start 2000 lies above --prefix_len 1024"),
    ("train.py --schedule exponential", "--schedule exponential: expected one of constant, linear, staircase"),
    ("train.py --lr -1", "--lr must be positive, found -1.0"),
    ("train.py --data nothing.jsonl", "--data nothing.jsonl: no file nothing.jsonl"),
    ("train.py --data BAD/text.jsonl", "text.jsonl, line 2: not JSON"),
    ("train.py --data BAD/empty.jsonl", "empty.jsonl: a prompt is empty"),
    ("train.py --student BAD", "no config.json there"),
    ("train.py --student BAD/nowhere", "no such folder"),
    ("train.py --teacher BAD/torn", "model.norm.weight is missing"),
    ("train.py --teacher BAD/other", "student and teacher have different tokenizers: id"),
    ("train.py --out_dir BAD/used", "already holds a run; discard it with --overwrite"),
    ("train.py --out_dir BAD/new --resume", "--resume: no complete checkpoint in --out_dir"),
    ("train.py --prefix_len 5000", "exceed the 2048 positions of the model"),
    ("train.py --loss sampled_kl --mix 0.5", "use it with --rollout student and --mix 0"),
    ("train.py --rollout data --teacher_prefix 3", "--mix and --teacher_prefix are for --rollout student"),
    ("train.py --prefix_len 8 --teacher_prefix 8", "--teacher_prefix 8 must lie below the shortest prefix, 8"),
    ("train.py --teacher_cache BAD/cache.jsonl", "--teacher_cache: in this run the teacher writes nothing"),
    ("train.py --mix 0.1 --batch_size 4", "--mix 0.1 of --batch_size 4 is less than one row"),
    ("train.py --schedule adaptive --window last", "which --window last and random have not"),
    ("train.py --data BAD/good.jsonl --eval_every 5", "has no held-out problems; give some with --eval_data"),
    ("train.py --eval_data nosuch", "--eval_data nosuch: no file"),
    ("sample.py --model BAD/run", "is a run's folder; its checkpoints are"),
    ("sample.py --model chains/techer", "did you mean chains/teacher?"),
    ("eval.py --out BAD/x.jsonl", "expected a .json file"),
    ("eval.py --max_new_tokens 100000", "positions of the model"),
    ("train.py --device cuda:99", "--device cuda:99: cannot be used here"),
    ("sample.py --indx 3", "unknown flag --indx; did you mean --index?"),
    ("sample.py --index 5000", "--index 5000: the data has rows 0 to 999"),
    ("sample.py --model BAD/nowhere", "no such folder"),
    ("eval.py --model BAD/torn", "model.norm.weight is missing"),
    ("eval.py --data BAD/text.jsonl", "text.jsonl, line 2: not JSON"),
    ("eval.py --num_samples 0", "--num_samples must be at least 1, found 0"),
])
def test_bad_input_is_one_clear_line_and_status_2(bad, command, message):
    result = run(*command.replace("BAD", str(bad)).split(), *(
        ["--out_dir", str(bad / "out")] if command.startswith("train") and "--out_dir" not in command else []
    ))
    assert result.returncode == 2
    assert message in result.stderr and len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert not (bad / "out").exists()


def test_a_reader_that_has_seen_enough_gets_no_traceback():
    command = [sys.executable, "train.py", "--plan"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()  # before anything is written
        said = process.stderr.read()
    assert (process.returncode, said) == (1, "train.py: ended, since nobody reads its output any more\n")
