"""Several ranks: what two of them learn, together or sharded, is what one learns. On gloo, so without a GPU."""

import copy
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import Qwen3Config

import train
from data import HERE, InputError
from data.flags import parse_flags
from data.run import read_log
from data.tokenizer import Tokenizer
from eval import Pair
from model import Transformer, shard
from train import Config

pytestmark = pytest.mark.skipif((os.cpu_count() or 1) < 2 or not dist.is_gloo_available(), reason="needs two cores")
ROOT = Path(train.__file__).parent
STEP = {"data": "chains", "steps": 3, "prefix_len": 12, "batch_size": 7, "eval_problems": 0, "eval_kl": 0,
        "micro_tokens": 100, "lr": 1e-2, "warmup": 0, "save_every": 2, "device": "cpu"}


def launch(world: int, work, *args) -> list:
    """What work(*args) returns in each of `world` processes that form a gloo group."""
    def member(rank, store, results):
        try:
            torch.set_num_threads(1)
            dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world)
            results.put((rank, work(*args), None))
        except Exception:  # noqa: BLE001
            results.put((rank, None, traceback.format_exc()))

    context, store = multiprocessing.get_context("fork"), tempfile.mktemp()
    results = context.SimpleQueue()
    processes = [context.Process(target=member, args=(rank, store, results)) for rank in range(world)]
    for process in processes:
        process.start()
    found = sorted((results.get() for _ in processes), key=lambda r: r[0])
    for process in processes:
        process.join()
    for rank, _, error in found:
        assert error is None, f"rank {rank}: {error}"
    return [result for _, result, _ in found]


def random_pair(config: Config, resume_from) -> Pair:
    """For train.load_pair: two small models in float64, of an odd number of ids."""
    tokenizer, models = Tokenizer(HERE / "chains/student"), []
    for seed, width, tied in ((1, 24, config.chat == "off"), (2, 32, config.chat == "auto")):
        model = Transformer(Qwen3Config(
            vocab_size=645, hidden_size=width, intermediate_size=37, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=16, max_position_embeddings=512, tie_word_embeddings=tied,
        )).double()
        with torch.no_grad():
            for p in model.parameters():
                p.normal_(0, 0.3, generator=torch.Generator().manual_seed(seed))
        models.append(model)
    student, teacher = models
    if resume_from is not None:
        student.load_state_dict(load_file(resume_from / "model.safetensors"))
    student.recompute, teacher = config.recompute, teacher.requires_grad_(False)
    student.vocab = teacher.vocab = tokenizer.vocab_size
    sampler = student
    if config.shard > 1:
        sampler = copy.deepcopy(student).requires_grad_(False)
        student = shard(student, config.shard, torch.float64)
    if config.shard_teacher:
        teacher = shard(teacher, config.shard, torch.float64)
    return Pair(student, sampler, teacher, tokenizer, tokenizer, tokenizer.vocab_size, tokenizer.stop_ids,
                tokenizer.stop_ids, torch.float64)


def learn(out: Path, flags: dict, silent: int | None = None) -> None:
    """train.train on random_pair. silent: a rank of two whose rows have nothing to learn from."""
    respond = train.respond

    def some_silent(*args):
        rollout = respond(*args)
        mine = torch.arange(len(rollout.lens)) * train.world_size() + train.rank()  # rows of the batch
        rollout.supervised[mine % 2 == silent] = 0
        return rollout

    patch = pytest.MonkeyPatch()
    with patch.context() as m:
        m.setattr(train, "load_pair", random_pair)
        m.setattr(train, "preflight", lambda *_: [])
        m.setattr(train, "respond", some_silent)
        config = Config(**STEP | flags, out_dir=str(out))
        config.typed = set(flags)
        train.train(config)


def counts(out: Path) -> list[dict]:
    """What a log counts, without times, and without the last digits of means."""
    return [{k: round(v, 9) if isinstance(v, float) else v for k, v in r.items()
             if "second" not in k and "per_s" not in k and k not in ("peak_memory", "kl_by_position")}
            for r in read_log(out / "log.jsonl")]


@pytest.mark.parametrize("flags, silent", [
    ({"teacher_prompt": "{answer}\n{prompt}", "mix": 0.3, "max_new_tokens": 20}, None),
    ({"chat": "auto"}, None), ({"chat": "off", "recompute": True}, None), ({"mix": 0.3, "max_new_tokens": 20}, None),
    ({"window": "random", "max_new_tokens": 30}, 1),
])
def test_ranks_learn_what_one_learns(tmp_path, flags, silent):
    learn(tmp_path / "one", flags, silent)
    layouts = {"two": (2, {}), "sharded": (2, {"shard": 2})}
    if flags == {"chat": "auto"}:
        layouts |= {"both sharded": (2, {"shard": 2, "shard_teacher": True}), "mesh": (4, {"shard": 2})}
    for name, (world, more) in layouts.items():
        launch(world, learn, tmp_path / name, flags | more, silent)
        assert counts(tmp_path / name) == counts(tmp_path / "one")
        for file in ("model.safetensors", "optimizer.safetensors"):
            a, b = (load_file(tmp_path / run / "step_000003" / file) for run in ("one", name))
            assert a.keys() == b.keys() and all(torch.allclose(a[k], b[k], rtol=0, atol=1e-12) for k in a), name


@pytest.mark.parametrize("before, after", [((1, 1), (2, 2)), ((2, 2), (1, 1)), ((2, 2), (2, 2)), ((2, 1), (2, 2))])
def test_a_run_resumes_in_another_layout(tmp_path, before, after):
    learn(tmp_path / "one", {})
    launch(before[0], learn, tmp_path / "cut", {"steps": 3, "shard": before[1]})
    for file in (tmp_path / "cut/step_000003").iterdir():
        file.unlink()
    (tmp_path / "cut/step_000003").rmdir()
    launch(after[0], learn, tmp_path / "cut", {"resume": True, "shard": after[1]})
    a, b = (load_file(tmp_path / run / "step_000003/model.safetensors") for run in ("one", "cut"))
    assert all(torch.allclose(a[k], b[k], rtol=0, atol=1e-12) for k in a)
    assert counts(tmp_path / "cut") == counts(tmp_path / "one")


@pytest.mark.parametrize("shards", [1, 2])
def test_an_interrupt_of_one_rank_ends_all_after_the_step(tmp_path, shards):
    def work():
        respond, made = train.respond, [0]

        def respond_until(*args):
            made[0] += 1
            if made[0] == 2 and dist.get_rank() == 1:
                signal.raise_signal(signal.SIGINT)
            return respond(*args)

        train.respond = respond_until
        learn(tmp_path / "run", {"save_every": 0, "steps": 4, "shard": shards})

    launch(2, work)
    assert [f.name for f in (tmp_path / "run").glob("step_*")] == ["step_000002"]


def test_a_rank_in_trouble_neither_asks_the_others_nor_saves_with_them(monkeypatch):
    """They wait for it inside the step, until torchrun ends them; the last checkpoint counts."""
    monkeypatch.setattr(train, "world_size", lambda: 2)
    run = SimpleNamespace(step=3, stage="learning", saved="out/step_000002", save=lambda: pytest.fail("saved"),
                          config=Config())
    expected = "step 4: out of memory in learning; the last state saved is out/step_000002.*Lower --micro_tokens"
    with pytest.raises(InputError, match=expected), train.say_what_to_change(run):
        raise torch.OutOfMemoryError("CUDA out of memory")


def torchrun(*args) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *map(str, args)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done


TINY = ("train.py", "--data", "chains", "--device", "cpu", "--prefix_len", 16, "--batch_size", 6, "--steps", 3,
        "--eval_problems", 6, "--eval_kl", 4, "--max_new_tokens", 100)


def alone(*flags) -> None:
    """TINY in this process, which has imported everything."""
    train.train(parse_flags(Config, "", [str(f) for f in (*TINY[1:], *flags)]))


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("one")
    alone("--out_dir", out)
    return out


@pytest.mark.parametrize("more", [(), ("--shard", 2)])
def test_torchrun_is_one_command(tmp_path, one, more):
    """As a user starts it: the same log as one process writes, one voice, a loadable checkpoint, an evaluation."""
    said = torchrun(*TINY, *more, "--out_dir", tmp_path).stdout
    assert said.count("after 3 steps") == 1 and said.count("8,000 prompts") == 1 and ", 2 ranks" in said
    logs = [read_log(out / "log.jsonl") for out in (one, tmp_path)]
    for a, b in zip(*logs, strict=True):
        for key in a.keys() & {"step", "tokens", "prefix_len", "accuracy", "finish", "flop_sample", "flop_student"}:
            assert a[key] == b[key], key
        assert "loss" not in a or a["loss"] == pytest.approx(b["loss"], abs=1e-5)
    a, b = (load_file(out / "step_000003/model.safetensors") for out in (one, tmp_path))
    assert all(torch.allclose(a[k], b[k], rtol=0, atol=1e-5) for k in a)
    if not more:
        model = tmp_path / "step_000003"
        assert "accuracy" in torchrun("eval.py", "--model", model, "--data", "chains", "--device", "cpu",
                                      "--num_problems", 3, "--max_new_tokens", 8).stdout


def test_a_rank_ends_where_its_work_does():
    """Not with Python's own end, in which one was seen to abort (SIGABRT)."""
    code = ("import atexit, data; atexit.register(print, 'too late'); "
            "data.run_command(lambda config: print('worked', config), 1)")
    for rank, said in ({}, "worked 1\ntoo late\n"), ({"TORCHELASTIC_RUN_ID": "x"}, "worked 1\n"):
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | rank, stdout=subprocess.PIPE,
                              text=True, check=True)
        assert done.stdout == said


def test_a_rank_that_dies_ends_the_others_and_loses_nothing(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *map(str, TINY),
               "--steps", "500", "--save_every", "1", "--lr_schedule", "constant", "--out_dir", str(tmp_path / "run")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while len(list((tmp_path / "run").glob("step_*"))) < 2:
            assert process.poll() is None
            time.sleep(0.05)
        members = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(members[-1]), 9)
        start = time.monotonic()
        process.wait(timeout=60)
    assert process.returncode and time.monotonic() - start < 40
    saved = max((tmp_path / "run").glob("step_*"))
    assert load_file(saved / "model.safetensors")
    steps = int(saved.name[5:]) + 2
    alone("--steps", steps, "--lr_schedule", "constant", "--resume", "--out_dir", tmp_path / "run")
