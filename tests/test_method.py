"""The method in ten sentences, each a test, mostly on the pair `chains`. Read this after the five files."""

import json
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

import sample
import train
from data import HERE
from data.flags import parse_flags
from data.run import checkpoints
from data.tokenizer import Tokenizer
from loss import distill_loss
from model import Transformer
from sample import KVCache, generate
from tests.reference import dense_loss, full_recompute
from train import Config

STUDENT, TEACHER = HERE / "chains/student", HERE / "chains/teacher"
STEP = {"data": "chains", "device": "cpu", "steps": 1, "batch_size": 6, "eval_problems": 0, "eval_kl": 0}


@pytest.fixture
def one_step(tmp_path, monkeypatch):
    """A function that makes one step of train.py and returns its rollout, its gradient by parameter, and the number of
    micro-batches."""
    def run(**flags):
        seen, respond, clip = {"losses": 0}, train.respond, torch.nn.utils.clip_grad_norm_

        def recorded_respond(*arguments):
            seen["rollout"] = respond(*arguments)
            return seen["rollout"]

        def recorded_clip(parameters, largest):
            parameters = list(parameters)
            seen["gradient"] = [p.grad.clone() for p in parameters]
            return clip(parameters, largest)

        def counted_loss(*arguments, **options):
            seen["losses"] += 1
            return distill_loss(*arguments, **options)

        monkeypatch.setattr(train, "respond", recorded_respond)
        monkeypatch.setattr(train, "distill_loss", counted_loss)
        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", recorded_clip)
        train.train(Config(**STEP | flags, out_dir=str(tmp_path / "run"), overwrite=(tmp_path / "run").exists()))
        monkeypatch.undo()
        return seen["rollout"], seen["gradient"], seen["losses"]
    return run


def test_1_the_steps_gradient_is_the_definitions_row_by_row(one_step):
    rollout, gradient, _ = one_step(prefix_len=24)
    student, teacher = Transformer.from_pretrained(STUDENT).double(), Transformer.from_pretrained(TEACHER).double()
    vocab, n = Tokenizer(STUDENT).vocab_size, int(rollout.lens.sum())
    for i in range(len(rollout.tokens)):
        prompt, length = int(rollout.prompt_lens[i]), int(rollout.lens[i])
        row = rollout.tokens[i : i + 1, : prompt + length]
        predicts = slice(prompt - 1, prompt + length - 1)  # the positions whose next token is the response's
        dense_loss(student(row)[0, predicts], student.head, teacher(row)[0, predicts].detach(), teacher.head.detach(),
                   loss="reverse_kl", vocab=vocab, token_weights=torch.full((length,), 1 / n)).backward()
    for found, p in zip(gradient, student.parameters()):
        assert (found - p.grad).norm() < 1e-4 * p.grad.norm() + 1e-7


def test_2_splitting_a_step_into_micro_batches_changes_nothing(one_step):
    (_, whole, one), (_, parts, six) = (one_step(prefix_len=24, micro_tokens=n) for n in (10_000, 1))
    assert (one, six) == (1, 6)
    for a, b in zip(whole, parts):
        assert (a - b).norm() < 1e-4 * a.norm() + 1e-8


def test_3_only_response_tokens_count_and_the_students_own_stop_among_them(one_step):
    rollout, *_ = one_step(prefix_len=256)
    assert rollout.finished.all()
    for row in rollout.micro_batches(1):  # one by one, the longest first
        _, _, targets, _ = rollout.part(row, "cpu")
        i = int(row)
        assert targets.tolist() == rollout.response(i)
        assert rollout.response(i)[-1] in Tokenizer(STUDENT).stop_ids


def test_4_no_stop_is_invented_at_the_cut(one_step):
    rollout, *_ = one_step(prefix_len=5)
    assert rollout.lens.max() == 5 and not rollout.finished[rollout.lens == 5].all()
    for i in range(6):
        if not rollout.finished[i]:
            assert not set(rollout.response(i)) & set(Tokenizer(STUDENT).stop_ids)


def test_5_the_cut_ends_the_sampling(one_step, monkeypatch):
    positions, step = [], sample.next_tokens
    monkeypatch.setattr(sample, "next_tokens", lambda model, tokens, at, *rest: positions.append(at.clone())
                        or step(model, tokens, at, *rest))
    rollout, *_ = one_step(prefix_len=5)
    last = max(int(at.max()) for at in positions[-4:])  # the step's decoding comes after the preflight's
    assert last <= int(rollout.prompt_lens.max()) + 5 - 2  # the fifth token is never fed back
    assert rollout.tokens.shape[1] <= int(rollout.prompt_lens.max()) + 5


def test_6_a_student_that_is_its_teacher_learns_nothing(one_step):
    _, gradient, _ = one_step(prefix_len=24, student=str(TEACHER), teacher=str(TEACHER))
    assert max(float(g.abs().max()) for g in gradient) < 1e-6


def test_7_stop_tokens_are_one_class():
    """Both models stop with certainty, by different ids: without the class tens of nats, with it nothing."""
    head = torch.eye(6, dtype=torch.float64) * 60
    hidden_s, hidden_t = torch.eye(6, dtype=torch.float64)[[2]], torch.eye(6, dtype=torch.float64)[[5]]
    assert distill_loss(hidden_s, head, hidden_t, head)[0] > 50
    assert abs(distill_loss(hidden_s, head, hidden_t, head, stop_ids=(2, 5))[0]) < 1e-12


def test_8_the_sampler_draws_what_a_sampler_that_recomputes_everything_draws():
    model, tokenizer = Transformer.from_pretrained(STUDENT).double(), Tokenizer(STUDENT)
    lines = (HERE / "chains/test.jsonl").read_text().splitlines()[:3]
    prompts = [tokenizer.encode_prompt(json.loads(line)["prompt"]) for line in lines]
    rollout = generate(model, prompts, 40, tokenizer.stop_ids, slots=2)
    for i, prompt in enumerate(prompts):
        noise = torch.rand(40, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
        expected = full_recompute(model, prompt, 40, tokenizer.stop_ids, lambda logits, step, noise=noise: int(
            (logits.softmax(-1).cumsum(-1) <= noise[step]).sum()))
        assert rollout.response(i) == expected


def test_9_reading_with_the_cache_is_reading_without_it():
    model = Transformer.from_pretrained(STUDENT).double()
    tokens = torch.randint(0, 600, (3, 40), generator=torch.Generator().manual_seed(0))
    expected, cache = model(tokens), KVCache(model.config, 3, 40, "cpu", torch.float64)
    cache.write_prompts(torch.arange(3))
    assert torch.allclose(model(tokens[:, :25], cache=cache), expected[:, :25], atol=1e-12)
    for t in range(25, 40):
        at = torch.full((3,), t)
        cache.write_at(at, t + 1)
        hidden = model(tokens[:, t : t + 1], at[:, None], cache)
        assert torch.allclose(hidden[:, 0], expected[:, t], atol=1e-12)


def test_10_killed_and_resumed_equals_left_alone(tmp_path):
    flags = ["--data", "chains", "--prefix_len", "8", "--batch_size", "4", "--steps", "12", "--save_every", "1",
             "--eval_problems", "0", "--eval_kl", "0", "--device", "cpu", "--out_dir"]
    train.train(parse_flags(Config, "", [*flags, str(tmp_path / "alone")]))
    process = subprocess.Popen([sys.executable, train.__file__, *flags, str(tmp_path / "killed")],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (tmp_path / "killed/step_000002").is_dir():
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    train.train(parse_flags(Config, "", ["--resume", "--out_dir", str(tmp_path / "killed")]))
    for file in ("model.safetensors", "optimizer.safetensors"):
        alone, killed = (load_file(tmp_path / name / "step_000012" / file) for name in ("alone", "killed"))
        assert all(torch.equal(alone[name], killed[name]) for name in alone)
    assert [f.name for f in checkpoints(tmp_path / "killed")] == ["step_000011", "step_000012"]
