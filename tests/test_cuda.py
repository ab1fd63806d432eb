"""The CUDA path: on a simulated device everywhere (tests/fake_cuda.py), and on a real one where there is one."""

import contextlib
import json

import pytest
import torch

import eval as evaluation
import sample
import train
from data import HERE, InputError
from data.flags import parse_flags
from data.tokenizer import Tokenizer
from loss import LOSSES, distill_loss
from model import Transformer, choose_device
from sample import cache_for, generate, next_tokens
from tests.bench import on_card, qwen3
from tests.fake_cuda import CudaTensor, fake_cuda
from tests.reference import live

STUDENT, TEACHER = HERE / "chains/student", HERE / "chains/teacher"
ROWS = [json.loads(line) for line in (HERE / "chains/test.jsonl").read_text().splitlines()[:8]]
TOKENIZER = Tokenizer(STUDENT)
PROMPTS = [TOKENIZER.encode_prompt(r["prompt"]) for r in ROWS]
real = torch.cuda.is_available()
device = contextlib.nullcontext if real else fake_cuda
simulated = pytest.mark.skipif(real, reason="counts are the simulated device's")


def reader(folder, where, dtype, vocab=TOKENIZER.vocab_size) -> Transformer:
    return Transformer.frozen(folder, torch.device(where), vocab, dtype)


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


# --- the same numbers as on a CPU


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 5e-3)])
def test_the_loss_is_that_of_the_cpu(kind, dtype, tolerance):
    g = torch.Generator().manual_seed(0)
    sizes = ((70, 32), (1003, 32), (70, 48), (1003, 48))
    hs, ws, ht, wt = (torch.randn(*size, generator=g).bfloat16().float() for size in sizes)  # nothing to round at first
    y = torch.randint(1000, (70,), generator=g)

    def step(where, dtype):
        h, w = hs.clone().to(where, dtype).requires_grad_(), ws.clone().to(where).requires_grad_()
        loss, stats = distill_loss(h, w, ht.to(where, dtype), wt.to(where, dtype), loss=kind, targets=y.to(where),
                                   stop_ids=(3, 5), vocab=1000, chunk_rows=32)
        loss.backward()
        return h.grad.cpu(), w.grad.cpu(), {name: x.cpu() for name, x in stats.items()}

    expected = step("cpu", torch.float32)
    with device() as gpu:
        found = step("cuda", dtype)
    assert real or gpu.live == 0  # nothing is kept
    assert max(map(relative, found[:2], expected)) < tolerance
    for name, x in expected[2].items():
        atol = 1e-4 if (name, kind) == ("loss", "sampled_kl") else 1e-5  # a product with a small difference
        assert torch.allclose(found[2][name], x, rtol=1e-5, atol=atol), name


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 5e-6), (torch.bfloat16, 6e-2)])
@pytest.mark.parametrize("recompute", [False, True])
def test_the_gradient_of_a_step_is_that_of_the_cpu(dtype, tolerance, recompute):
    tokens = torch.tensor([p[:16] for p in PROMPTS])

    def step(where, dtype):
        student, teacher = Transformer.from_pretrained(STUDENT, where), reader(TEACHER, where, dtype)
        student.recompute = recompute
        on, mask = tokens.to(where), torch.arange(15, device=where).expand(8, -1) >= 5
        with torch.autocast(where, dtype=dtype, enabled=dtype == torch.bfloat16):
            hidden = student(on[:, :-1])[mask].to(dtype)
        loss, _ = distill_loss(hidden, student.head, teacher(on[:, :-1])[mask], teacher.head, vocab=600,
                               targets=on[:, 1:][mask], stop_ids=(2, 3))
        loss.backward()
        return torch.cat([p.grad.cpu().flatten() for p in student.parameters()])

    expected = step("cpu", torch.float32)
    with device():
        assert relative(step("cuda", dtype), expected) < tolerance


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("slots", [None, 3])
def test_sampling_is_that_of_the_cpu(slots, graphs):
    """With refill, with rows that end at different times, and for two prefixes in one run, as a schedule has them."""
    def responses(where):
        model = reader(STUDENT, where, torch.float32)
        model.graphs = {} if graphs and where == "cuda" else None
        rollouts = [generate(model, PROMPTS, cap, TOKENIZER.stop_ids, slots=slots) for cap in (12, 90)]
        assert {rows for rows, *_ in model.graphs or ()} <= {slots or 8, 4, 2, 1}  # few graphs while rows end
        return [r.response(i) for r in rollouts for i in range(len(PROMPTS))]

    expected = responses("cpu")
    with device():
        assert responses("cuda") == expected


def test_logits_to_sample_from_are_not_rounded_to_half_precision():
    hidden = torch.randn(9, 96, generator=torch.Generator().manual_seed(0)).bfloat16()
    with device():
        model = reader(STUDENT, "cuda", torch.bfloat16, 600)
        found, exact = model.logits(hidden.to("cuda")).cpu(), hidden.double() @ model.head[:600].cpu().double().T
    assert found.dtype == torch.float32 and relative(found, exact) < 1e-5


def typed(module, main, *flags):
    main(parse_flags(module.Config, "", ["--device", "cuda", *map(str, flags)]))


@pytest.fixture
def run(tmp_path):
    """The flags of a small run, and where it goes."""
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(r) + "\n" for r in ROWS))
    return ("--data", data, "--student", STUDENT, "--teacher", TEACHER, "--prefix_len", 8, "--batch_size", 4,
            "--max_new_tokens", 12, "--eval_problems", 0, "--eval_kl", 0, "--out_dir", tmp_path / "run")


@pytest.mark.parametrize("more", [("--mix", "0.5", "--schedule", "linear"), ("--dtype", "float32", "--recompute"),
                                  pytest.param(("--compile",), marks=simulated)])  # tests/card.sh has the real one
def test_a_run_and_its_resumption(tmp_path, run, more, monkeypatch, capsys):
    compiled, graphs, examine = [], [], train.examine
    if "--compile" in more:  # the simulated device has graphs of decode steps, and no compiler
        monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **_: compiled.append(self))
        monkeypatch.setattr(train, "examine", lambda pair, *a: (graphs.append(pair.sampler.graphs), examine(pair, *a)))
    data, checkpoint = tmp_path / "rows.jsonl", tmp_path / "run/step_000003"
    with device():
        typed(train, train.train, *run, "--eval_data", data, "--eval_problems", 4, "--eval_kl", 4, "--steps", 3,
              "--save_every", 2, *more)
    assert "--compile" not in more or len(compiled) == 2 and all(graphs)
    records = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    losses = [r["loss"] for r in records if "loss" in r]
    assert all(r["peak_memory"] > 2**20 for r in records if "loss" in r)
    for file in checkpoint.iterdir():
        file.unlink()
    with device():
        typed(train, train.train, "--resume", "--out_dir", tmp_path / "run")
    again = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [r["loss"] for r in again if "loss" in r] == pytest.approx(losses, abs=1e-2 if real else 0)
    with device():
        typed(sample, sample.main, "--model", checkpoint, "--data", "chains", "--max_new_tokens", 8)
        typed(evaluation, evaluation.main, "--model", checkpoint, "--data", data, "--max_new_tokens", 8)


@pytest.mark.parametrize("flags", [("--device", "cpu", "--teacher_device", "cuda"),
                                   ("--device", "cuda", "--teacher_device", "cpu")])
def test_the_teacher_may_live_on_another_device(tmp_path, run, flags, capsys):
    data = tmp_path / "rows.jsonl"
    run = (*run, "--dtype", "float32", "--steps", 2, "--eval_data", data, "--eval_kl", 4, "--mix", 0.5)
    losses = []
    for where in (("--device", "cpu"), flags):
        with device():
            main = parse_flags(train.Config, "", [*map(str, run), "--overwrite", *where])
            train.train(main)
        log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
        losses.append([r["kl"] for r in log if "kl" in r])
    assert len(losses[0]) == 4 and losses[1] == pytest.approx(losses[0], rel=1e-3 if real else 1e-5)


# --- what CUDA would refuse, and what it costs


@simulated
def test_the_simulated_device_refuses_what_cuda_refuses():
    with fake_cuda() as gpu:
        x = torch.ones(3, device="cuda")
        assert isinstance(x, CudaTensor) and x.is_cuda and str(x.device) == "cuda:0"
        for wrong in (lambda: x + torch.ones(3), lambda: x[:, None] @ torch.ones(1, 3), lambda: x.numpy(),
                      lambda: x.normal_(generator=torch.Generator()), lambda: torch.cat((x, torch.ones(1))),
                      lambda: torch.mm(x[:, None].double(), x[None].double(), out_dtype=torch.float32)):
            with pytest.raises((RuntimeError, TypeError)):
                wrong()
        assert not gpu.waits and (x * 2).sum().item() == 6 and sum(gpu.waits.values()) == 1
        with pytest.raises(RuntimeError, match="capturing"), torch.cuda.graph(torch.cuda.CUDAGraph()):
            x.sum().item()


def test_attention_is_not_cudnns():
    torch.backends.cuda.enable_cudnn_sdp(True)
    with device():
        choose_device("cuda")
        assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_the_gpu_of_a_mac_is_refused_by_name():
    with pytest.raises(InputError, match="--device mps: cannot be used, since the loss adds in float64.*--device cpu"):
        choose_device("mps")
    assert choose_device("").type == ("cuda" if real else "cpu")  # not chosen either


@simulated
def test_peak_memory_is_that_since_the_last_call():
    with fake_cuda():
        x = torch.zeros(2**20, device="cuda")
        del x
        peaks = [train.peak_memory(torch.device("cuda", 0)) for _ in range(2)]
    assert peaks[0] >= 2**22 > peaks[1]


@simulated
def test_running_out_of_memory_in_the_first_optimizer_step_is_explained(run, monkeypatch, capsys):
    clip = torch.nn.utils.clip_grad_norm_
    with fake_cuda() as gpu:
        def full(*args):
            gpu.limit = gpu.live + 2**20
            return clip(*args)

        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", full)
        with pytest.raises(InputError, match="out of memory in learning.*--micro_tokens"):
            typed(train, train.train, *run, "--steps", 1)


REAL_IDS = 151_669  # of Qwen3's 151,936 rows


def launches_of_a_step(layers: int, gpu) -> int:
    model = on_card(qwen3("1.7B", layers), torch.bfloat16)
    model.vocab = REAL_IDS
    cache_for(model, 64, 1088)
    at = torch.zeros(64, dtype=torch.long, device="cuda")
    for _ in range(2):  # the first one brings the rotary frequencies to the device
        gpu.reset()
        next_tokens(model, at, at, at.double(), 128, (1.0, None, None))
    assert not gpu.waits
    return sum(gpu.launches.values())


@simulated
def test_launches_and_waits_of_decoding():
    with fake_cuda(shapes=True) as gpu:
        two, four = (launches_of_a_step(n, gpu) for n in (2, 4))
        assert (four - two) / 2 <= 30 and two - (four - two) <= 45  # a layer; embedding, head and sampling
        model, counts, waits = on_card(qwen3("1.7B", layers=1), torch.bfloat16), [], []
        generate(model, [[5]], 1, ())
        for model.graphs in (None, {}):
            for cap in (16, 48):
                gpu.reset()
                generate(model, [[5] * (99 + i % 2) for i in range(64)], cap, (2, 3))
                counts.append(sum(gpu.launches.values()))
                waits.append(sum(gpu.waits.values()))
        assert max(waits) <= 16 and waits[1] - waits[0] == waits[3] - waits[2] == 2, waits  # 32 steps more, two checks
        assert counts[3] - counts[2] <= 32 * 26 < counts[1] - counts[0]  # a recorded step, and what keeps track of rows


@simulated
def test_a_second_generate_meets_no_new_attention_shapes_and_records_no_new_graphs():
    g = torch.Generator().manual_seed(0)
    prompts = [torch.randint(5, 500, (n,), generator=g).tolist() for n in range(30, 60)]
    with fake_cuda() as gpu:
        model = reader(STUDENT, "cuda", torch.bfloat16)
        for model.graphs in (None, {}):
            seen = []
            for rows in (range(15, 30), range(15)):  # the second batch's prompts are others, and shorter
                gpu.reset()
                generate(model, [prompts[i] for i in rows], 30, ())
                seen.append(({key for key in gpu.sdpa if key[1][2] <= 4}, model.cache, dict(model.graphs or {})))
            (shapes, cache, made), (more_shapes, same_cache, more_made) = seen
            assert shapes and more_shapes <= shapes and same_cache is cache and more_made == made


@simulated
@pytest.mark.parametrize("dtype, kernel", [(torch.float32, "efficient"), (torch.bfloat16, "flash")])
def test_attention_has_a_kernel_that_makes_no_square_matrix(dtype, kernel):
    with fake_cuda() as gpu:
        model = reader(TEACHER, "cuda", dtype)
        model(torch.zeros(2, 30, dtype=torch.long, device="cuda"))
        assert gpu.sdpa and all(kernel in key[0] for key in gpu.sdpa)


@simulated
def test_launches_of_the_loss():
    def chunk(loss):
        """Launches that 256 rows more take."""
        counts = []
        for n in (256, 512):
            h = torch.zeros(n, 2048, device="cuda", dtype=torch.bfloat16, requires_grad=True)
            w = torch.zeros(151_936, 2048, device="cuda", requires_grad=True)
            t = torch.zeros(151_936, 4096, device="cuda", dtype=torch.bfloat16)
            gpu.reset()
            distill_loss(h, w, t[:n], t, loss=loss, targets=torch.full((n,), 7, device="cuda"), vocab=REAL_IDS,
                         stop_ids=(2, 3), top_k=64)[0].backward()
            counts.append(sum(gpu.launches.values()))
            assert sum(gpu.waits.values()) == 2  # whatever the number of chunks
            assert gpu.launches["mm torch.bfloat16"] == 3 * n // 256 and "mm torch.float32" not in gpu.launches
        return counts[1] - counts[0]

    with fake_cuda(shapes=True) as gpu:
        assert chunk("reverse_kl") <= 60
        assert max(chunk(loss) for loss in LOSSES) <= 90


@simulated
def test_waits_and_products_of_a_micro_batch(run, capsys):
    """Of the loop in train.py: one run with one micro-batch a step, another with four; what the difference is."""
    waits = []
    for micro_tokens in (8192, 1):
        with fake_cuda() as gpu:
            typed(train, train.train, *run, "--steps", 1, "--micro_tokens", micro_tokens, "--overwrite")
        waits.append(gpu.waits)
        products = {name for name in gpu.launches if "mm " in name}
        assert products == {"mm torch.bfloat16", "addmm torch.bfloat16"}
    more = waits[1] - waits[0]
    assert 0 < sum(more.values()) / 3 <= 8, more


@pytest.mark.parametrize("recompute", [False, True])
def test_the_plan_foresees_the_peak(recompute, tmp_path, capsys):
    """Qwen3-1.7B from 8B, batch 64, prefix 1,024: the peaks of sampling, of a micro-batch, when gradients and both
    moments are there, and of an evaluation."""
    qwen3("1.7B").save_pretrained(tmp_path / "student")
    qwen3("8B").save_pretrained(tmp_path / "teacher")
    with contextlib.nullcontext() if real else fake_cuda(shapes=True):
        choose_device("cuda")
        planned = train.plan(train.Config(
            student=str(tmp_path / "student"), teacher=str(tmp_path / "teacher"), batch_size=64, max_new_tokens=2048,
            eval_batch_size=64, recompute=recompute)).values()
        student, teacher, sampler = (on_card(qwen3(name), dtype) for name, dtype in (
            ("1.7B", torch.float32), ("8B", torch.bfloat16), ("1.7B", torch.bfloat16)))
        student.recompute, sampler.vocab = recompute, REAL_IDS
        moments = [torch.zeros_like(p) for p in student.parameters() for _ in range(2)]
        cache_for(sampler, 64, 64 + 1024)
        torch.cuda.reset_peak_memory_stats()
        generate(sampler, [[5] * 64] * 64, 2, (2, 3))
        peaks = [torch.cuda.max_memory_allocated()]
        for p in student.parameters():
            p.grad = torch.zeros_like(p)
        tokens = torch.full((7, 64 + 1024), 7, device="cuda")
        mask = torch.arange(64 + 1023, device="cuda").expand(7, -1) >= 63
        torch.cuda.reset_peak_memory_stats()
        hidden_t = teacher(tokens[:, :-1])[mask]
        with torch.autocast("cuda", dtype=torch.bfloat16):
            hidden = student(tokens[:, :-1])[mask].to(torch.bfloat16)
        distill_loss(hidden, student.head, hidden_t, teacher.head, targets=tokens[:, 1:][mask], vocab=REAL_IDS,
                     stop_ids=(2, 3))[0].backward()
        peaks.append(torch.cuda.max_memory_allocated())
        for p in student.parameters():
            p.grad = None
        del hidden, hidden_t
        cache_for(sampler, 64, 64 + 2048)
        torch.cuda.reset_peak_memory_stats()
        generate(sampler, [[5] * 64] * 64, 2, (2, 3))
        peaks.append(torch.cuda.max_memory_allocated())
        assert len(moments) == 2 * len(list(student.parameters()))
    assert peaks == pytest.approx([*planned], rel=0.15)


def test_compiled_forwards_serve_every_length_and_sampling_compiles_nothing():
    """Graphs are counted by a backend that only counts. The first two lengths may compile, later ones must not."""
    made, (student, teacher) = [], (live(qwen3("0.6B", layers=1, tiny=True), seed) for seed in (0, 1))

    def count(graph, _):
        made.append(graph)
        return graph.forward

    counts = []
    for model in (student, teacher.requires_grad_(False)):
        model.compile(dynamic=True, backend=count)
    for rows, length in ((2, 5), (3, 9), (4, 17), (7, 33)):
        tokens = torch.randint(600, (rows, length))
        (student(tokens) - teacher(tokens)).square().sum().backward()
        generate(student, tokens.tolist(), 2 * length, ())
        counts.append(len(made))
    assert 0 < counts[1] == counts[3], counts
