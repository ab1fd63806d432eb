"""The CUDA path: on a simulated device everywhere (tests/fake_cuda.py), and on a real one where there is one."""

import contextlib
import json

import pytest
import torch

import eval as evaluation
import sample
import train
from data import HERE
from data.flags import parse_flags
from data.tokenizer import Tokenizer
from loss import LOSSES, distill_loss
from sample import Decoder, generate
from tests.fake_cuda import CudaTensor, fake_cuda

STUDENT = HERE / "chains/student"
ROWS = [json.loads(line) for line in (HERE / "chains/test.jsonl").read_text().splitlines()[:8]]
device = contextlib.nullcontext if torch.cuda.is_available() else fake_cuda


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)])
def test_the_loss_is_that_of_the_cpu(kind, dtype, tolerance):
    g = torch.Generator().manual_seed(0)
    hs, ws, ht, wt = (torch.randn(*s, generator=g) for s in ((70, 32), (1003, 32), (70, 48), (1003, 48)))
    y = torch.randint(1000, (70,), generator=g)

    def step(where):
        h, w = hs.clone().to(where, dtype).requires_grad_(), ws.clone().to(where).requires_grad_()
        loss, stats = distill_loss(h, w, ht.to(where, dtype), wt.to(where, dtype), loss=kind, targets=y.to(where),
                                   stop_ids=(3, 5), vocab=1000, chunk_rows=32)
        loss.backward()
        return h.grad.cpu(), w.grad.cpu(), *(x.cpu().float() for x in stats.values())

    expected = step("cpu")
    with device():
        found = step("cuda")
    for a, b in zip(found[:2], expected):
        assert relative(a, b) < tolerance


@pytest.mark.parametrize("slots", [None, 3])
def test_sampling_is_that_of_the_cpu(slots):
    tokenizer = Tokenizer(STUDENT)
    prompts = [tokenizer.encode_prompt(r["prompt"]) for r in ROWS]

    def responses(where):
        decoder = Decoder.from_pretrained(STUDENT, where, torch.float32, tokenizer.vocab_size)
        rollout = generate(decoder, prompts, 40, tokenizer.stop_ids, slots=slots)
        return [rollout.response(i) for i in range(len(prompts))]

    expected = responses("cpu")
    with device():
        assert responses("cuda") == expected


def test_no_decode_step_waits_for_the_device():
    if torch.cuda.is_available():
        pytest.skip("waits are counted on the simulated device")
    tokenizer = Tokenizer(STUDENT)
    prompts = [tokenizer.encode_prompt(r["prompt"]) for r in ROWS]
    waits = []
    with fake_cuda() as gpu:
        decoder = Decoder.from_pretrained(STUDENT, "cuda", torch.bfloat16, tokenizer.vocab_size)
        for cap in (33, 65):
            before = sum(n for (kind, _), n in gpu.syncs.items() if kind == "to host")
            generate(decoder, prompts, cap, ())
            waits.append(sum(n for (kind, _), n in gpu.syncs.items() if kind == "to host") - before)
    assert waits[1] - waits[0] <= 2 * 2, waits  # 32 steps more, two checks more


@pytest.mark.parametrize("more", [(), ("--mix", "0.5", "--schedule", "linear"), ("--dtype", "float32", "--recompute")])
def test_a_run_and_its_resumption(tmp_path, more, capsys):
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(r) + "\n" for r in ROWS))

    def command(module, main, *typed):
        main(parse_flags(module.Config, "", ["--device", "cuda", *map(str, typed)]))

    common = ("--data", data, "--eval_data", data, "--student", STUDENT, "--teacher", HERE / "chains/teacher",
              "--prefix_len", 8, "--batch_size", 4, "--eval_problems", 4, "--eval_kl", 4, "--max_new_tokens", 12,
              "--lr_schedule", "constant", "--steps", 3, "--save_every", 2, *more)
    with device():
        command(train, train.train, *common, "--out_dir", tmp_path / "run")
    losses = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    losses = [r["loss"] for r in losses if "loss" in r]
    for file in (tmp_path / "run/step_000003").iterdir():
        file.unlink()
    with device():
        command(train, train.train, "--resume", "--out_dir", tmp_path / "run")
    again = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [r["loss"] for r in again if "loss" in r] == pytest.approx(losses, abs=1e-6 if device is fake_cuda else 1e-2)
    with device():
        command(sample, sample.main, "--model", tmp_path / "run/step_000003", "--data", "chains", "--max_new_tokens", 8)
        command(evaluation, evaluation.main, "--model", tmp_path / "run/step_000003", "--data", data,
                "--max_new_tokens", 8)


@pytest.mark.skipif(torch.cuda.is_available(), reason="of the simulated device")
def test_the_simulated_device_refuses_what_cuda_refuses():
    with fake_cuda() as gpu:
        x = torch.ones(3, device="cuda")
        assert isinstance(x, CudaTensor) and x.is_cuda and str(x.device) == "cuda:0"
        for wrong in (lambda: x + torch.ones(3), lambda: x[:, None] @ torch.ones(1, 3), lambda: x.numpy(),
                      lambda: x.normal_(generator=torch.Generator()), lambda: torch.cat((x, torch.ones(1))),
                      lambda: torch.mm(x[:, None].double(), x[None].double(), out_dtype=torch.float32)):
            with pytest.raises((RuntimeError, TypeError)):
                wrong()
        assert not gpu.syncs and (x * 2).sum().item() == 6 and sum(gpu.syncs.values()) == 1
