"""Measurements, as ratios against a peer in the same process. Run on a quiet machine; nothing here is a test.

    python tests/bench.py loss     # speed and memory of the fused reverse KL, against dense autograd and TRL
                                   # (pip install trl, if you want that column)
    python tests/bench.py sample   # tokens per second of generate, against transformers' with either cache
    python tests/bench.py step     # a whole step of training, against TRL's DistillationTrainer (pip install trl)
    python tests/bench.py ranks    # tokens per second of two ranks against one, on a CPU
    python tests/bench.py gpu      # a CUDA card: decoding, learning, loss, a whole step, all from random weights;
                                   # it has not run on one yet
"""

import contextlib
import gc
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
import transformers
from transformers import LlamaConfig, Qwen3Config

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train
from data.run import Run, read_log
from data.tokenizer import Tokenizer
from loss import distill_loss
from model import Transformer, choose_device, count_flops, count_parameters
from sample import cache_for, generate, next_tokens
from tests.reference import live

SMOLLM2 = {"vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9,
           "num_key_value_heads": 3, "tie_word_embeddings": True, "max_position_embeddings": 8192}


def seconds(function, *arguments) -> float:
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def loss_ours(h, w, ht, wt):
    return distill_loss(h, w, ht, wt)[0]


def loss_dense(h, w, ht, wt):
    log_p, log_q = (h @ w.T).log_softmax(-1), (ht @ wt.T).log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def loss_trl(h, w, ht, wt):
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    return ChunkedDivergenceFunction.apply(h, w, None, ht, wt, None, 1.0, 1.0)[0].mean()


LOSS_SHAPES = {"SmolLM2": (49_152, 576, 576), "Qwen3": (151_936, 1024, 2560)}


def loss_inputs(name: str, n: int) -> list[torch.Tensor]:
    v, h, h_t = LOSS_SHAPES[name]
    scale = 3.0  # of a logit
    made = [torch.randn(n, h), torch.randn(v, h).mul_(scale / h**0.5),
            torch.randn(n, h_t), torch.randn(v, h_t).mul_(scale / h_t**0.5)]
    return [x.requires_grad_(i < 2) for i, x in enumerate(made)]


def status_bytes(field: str) -> int:
    return int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def loss_memory(name: str, n: str, which: str) -> None:
    """Runs in a process of its own, whose peak it prints: bytes above the inputs, dH and dW."""
    inputs = loss_inputs(name, int(n))
    [x.sum() for x in inputs]
    globals()[f"loss_{which}"](*[x[:2] if i in (0, 2) else x[:64] for i, x in enumerate(inputs)]).backward()  # warm up
    inputs = [x.detach().requires_grad_(i < 2) for i, x in enumerate(inputs)]
    gc.collect()
    before = status_bytes("VmRSS")
    globals()[f"loss_{which}"](*inputs).backward()
    print(status_bytes("VmHWM") - before - sum(x.numel() * 4 for x in inputs[:2]))


def bench_loss(turns: str = "3") -> None:
    peers = {"ours": loss_ours, "dense": loss_dense}
    try:
        import trl

        peers["trl"] = loss_trl
        print(f"trl {trl.__version__}: ChunkedDivergenceFunction, its torch path")
    except ImportError:
        print("no TRL here: pip install trl")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, float32, reverse KL, forward + backward; "
          f"best of {turns} turns; MiB = peak above the inputs, dH and dW, in a process of its own")
    for name, n in (("SmolLM2", 1024), ("SmolLM2", 4096), ("Qwen3", 512), ("Qwen3", 2048)):
        timed = n in (1024, 512)
        inputs, times = loss_inputs(name, n), {k: [] for k in peers}
        for _ in range(int(turns) if timed else 0):  # in turns: a slow minute hits all
            for k, loss in peers.items():
                for x in inputs[:2]:
                    x.grad = None
                times[k].append(seconds(lambda loss, x: loss(*x).backward(), loss, inputs))
        best = {k: min(t) for k, t in times.items() if t}
        line = f"{name:8} N {n:5}: "
        for k in best or ["ours"]:
            above = subprocess.run([sys.executable, __file__, "loss_memory", name, str(n), k], capture_output=True,
                                   text=True, check=True).stdout
            line += f"{k} " + (f"{best[k]:6.2f} s ({best[k] / best['ours']:.2f}x) " if best else "")
            line += f"{int(above) / 2**20:6.0f} MiB  "
        print(line, flush=True)


def our_tokens(model, prompts, cap, stops) -> int:
    return int(generate(model, prompts, cap, stops).lens.sum())


def their_tokens(reference, prompts, cap, stops, cache) -> int:
    """Sample with transformers, padded on the left as it needs; the number of tokens up to each row's stop."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    options = {"cache_implementation": cache} if cache else {}
    out = reference.generate(
        ids, attention_mask=mask, do_sample=True, top_k=0, top_p=1.0, temperature=1.0, max_new_tokens=cap,
        eos_token_id=list(stops) or None, pad_token_id=0, **options,
    )[:, longest:]
    ended = torch.isin(out, torch.tensor(stops)).int()
    return sum(int(row.argmax()) + 1 if row.any() else len(row) for row in ended)


def bench_sample(only: str = "", caches: str = "dynamic,static") -> None:
    from transformers import AutoModelForCausalLM

    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {torch.get_num_threads()} threads, "
          "float32; best of 2 turns")
    g = torch.Generator().manual_seed(0)
    chains = ROOT / "data/chains"
    with tempfile.TemporaryDirectory() as folder:
        live(LlamaConfig(**SMOLLM2, num_hidden_layers=30), seed=0).save_pretrained(folder)
        small = [json.loads(line)["prompt"] for line in (chains / "test.jsonl").read_text().splitlines()[:64]]
        jobs = [(f"SmolLM2 shape, batch {b}", folder, b, 64, 128, False) for b in (1, 8, 32)]
        jobs += [("SmolLM2 shape, batch 32, ragged, natural lengths", folder, 32, None, 128, True),
                 ("embedded teacher, batch 64", chains / "teacher", 64, "chains", 256, False)]
        for name, path, batch, length, cap, natural in jobs:
            if only not in name:
                continue
            model = Transformer.from_pretrained(path)
            reference = AutoModelForCausalLM.from_pretrained(path).eval()
            reference.generation_config.eos_token_id = None
            v, stops = model.vocab, ()
            if length == "chains":
                tokenizer = Tokenizer(path)
                prompts, stops = [tokenizer.encode_prompt(p) for p in small], tokenizer.stop_ids
            else:
                lens = torch.randint(8, 121, (batch,), generator=g).tolist() if length is None else [length] * batch
                prompts = [torch.randint(1, v, (n,), generator=g).tolist() for n in lens]
            if natural:  # a share 4 / cap of the random model's nearly even distribution: geometric, mean cap / 4
                stops = tuple(range(v - v * 4 // cap, v))
            runs = {"ours": (our_tokens, model, prompts, cap, stops)}
            for cache in caches.split(","):
                runs[cache] = (their_tokens, reference, prompts, cap, stops, "static" if cache == "static" else None)
            speeds = {k: [] for k in runs}
            for _ in range(2):
                for k, (run, *arguments) in runs.items():
                    start = time.perf_counter()
                    speeds[k].append(run(*arguments) / (time.perf_counter() - start))
            best = {k: max(x) for k, x in speeds.items()}
            peers = {k: x for k, x in best.items() if k != "ours"}
            print(f"{name}: ours {best['ours']:,.0f} tok/s; generate "
                  + ", ".join(f"{k} cache {x:,.0f}" for k, x in peers.items())
                  + f": {best['ours'] / max(peers.values()):.2f}x", flush=True)


def bench_step(batch: str = "16", cap: str = "128", steps: str = "3") -> None:
    batch, cap, steps = int(batch), int(cap), int(steps)
    chains = ROOT / "data/chains"
    lines = (chains / "test.jsonl").read_text().splitlines()[: batch * steps]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, float32; "
          f"student 24 and teacher 30 layers of the SmolLM2 shape, batch {batch}, cap {cap}")
    with tempfile.TemporaryDirectory() as folder:
        for name, layers in (("student", 24), ("teacher", 30)):
            live(LlamaConfig(**SMOLLM2, num_hidden_layers=layers), seed=0).save_pretrained(Path(folder) / name)
            wide_tokenizer(Path(folder) / name, SMOLLM2["vocab_size"])
        (Path(folder) / "train.jsonl").write_text("\n".join(lines))
        best = {}
        try:
            best["trl"] = their_step(folder, [json.loads(line)["prompt"] for line in lines], batch, cap, steps)
        except ImportError:
            print("no TRL here: pip install trl")
        train.train(train.Config(
            student=f"{folder}/student", teacher=f"{folder}/teacher", data=f"{folder}/train.jsonl", prefix_len=cap,
            batch_size=batch, steps=steps, lr=1e-6, eval_problems=0, eval_kl=0, out_dir=f"{folder}/run", device="cpu",
        ))
        records = read_log(Path(folder) / "run/log.jsonl")
        best["ours"] = min((r["seconds_sample"] + r["seconds_learn"], r["tokens"]) for r in records)
    for name, (taken, tokens) in best.items():
        ratio = "" if name == "ours" else f" ({taken / best['ours'][0] * best['ours'][1] / tokens:.2f}x our time)"
        print(f"{name}: {taken:.1f} s per step, {tokens / taken:,.0f} response tokens/s{ratio}")


def wide_tokenizer(folder: Path, vocab: int) -> None:
    """The embedded tokenizer with so many ids: without them train.py would leave the padding out of the head, and do
    less than a peer that takes the whole."""
    for file in ("tokenizer_config.json", "generation_config.json"):
        shutil.copy(ROOT / "data/chains/teacher" / file, folder)
    tokenizer = json.loads((ROOT / "data/chains/teacher/tokenizer.json").read_text())
    ids = tokenizer["model"]["vocab"]
    ids |= {f"~{i}": i for i in range(len(ids), vocab)}  # no prompt holds them
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def their_step(folder, texts, batch, cap, steps) -> tuple[float, int]:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DistillationConfig, DistillationTrainer

    class Clock(TrainerCallback):
        taken: list[float] = []  # noqa: RUF012

        def on_step_begin(self, *_, **__):
            self.start = time.perf_counter()

        def on_step_end(self, *_, **__):
            self.taken.append(time.perf_counter() - self.start)
            print(f"trl, step {len(self.taken) - 1}: {self.taken[-1]:.1f} s", flush=True)

    models = [AutoModelForCausalLM.from_pretrained(Path(folder) / name) for name in ("student", "teacher")]
    tokenizer = AutoTokenizer.from_pretrained(Path(folder) / "student", padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    options = DistillationConfig(
        output_dir=str(Path(folder) / "trl"), per_device_train_batch_size=batch, max_completion_length=cap,
        max_steps=steps, learning_rate=1e-6, use_cpu=True, gradient_checkpointing=False, report_to="none",
        save_strategy="no", disable_tqdm=True, logging_steps=1000,
    )
    DistillationTrainer(
        model=models[0], teacher_model=models[1], args=options, train_dataset=Dataset.from_dict({"prompt": texts}),
        processing_class=tokenizer, callbacks=[Clock()],
    ).train()
    return min(Clock.taken), batch * cap


def bench_ranks(steps: str = "4") -> None:
    """Tokens per second of training on `search`, batch 64, of one rank and of two at one thread each; fastest step."""
    rates, env = [], os.environ | {"OMP_NUM_THREADS": "1"}
    flags = f"--data search --device cpu --prefix_len 256 --batch_size 64 --eval_problems 0 --eval_kl 0 --steps {steps}"
    with tempfile.TemporaryDirectory() as folder:
        for n in (1, 2):
            start = f"-m torch.distributed.run --standalone --nproc_per_node {n} train.py --out_dir {folder}/{n}"
            command = [sys.executable, *start.split(), *flags.split()]
            subprocess.run(command, cwd=ROOT, env=env, check=True, capture_output=True)
            rates.append(max(r["tokens_per_s"] for r in read_log(Path(folder) / str(n) / "log.jsonl")))
    print(f"tokens/s: 1 rank {rates[0]:,.0f}, 2 ranks {rates[1]:,.0f}, {rates[1] / rates[0]:.2f} times as many")


# --- a CUDA card

QWEN3 = {"vocab_size": 151_936, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40_960,
         "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
QWEN3_SIZES = {"0.6B": (1024, 3072, 28, 16), "1.7B": (2048, 6144, 28, 16), "8B": (4096, 12_288, 36, 32)}
TINY = bool(os.environ.get("CARD_TINY"))  # models of a few thousand weights, for a run on a simulated device
REAL_IDS = 701 if TINY else 151_669  # of a Qwen3 vocabulary's rows; the rest is padding
GOALS = {"decode 64 rows, graphs, share of bandwidth": 0.6, "loss, TFLOP/s": 280, "student, MFU": 0.4}


def qwen3(name: str, layers: int = 0, tiny: bool = False) -> Qwen3Config:
    hidden, mlp, depth, heads = QWEN3_SIZES[name]
    small = {"vocab_size": 704, "head_dim": 16} if tiny or TINY else {}
    if small:
        hidden, mlp, depth = hidden // 32, mlp // 32, 2
    return Qwen3Config(**QWEN3 | small, hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers or depth,
                       num_attention_heads=heads, tie_word_embeddings=name != "8B")


def on_card(config, dtype: torch.dtype = torch.float32) -> Transformer:
    """Random weights, made on the device; those in bfloat16 are for reading."""
    with torch.device("meta"):
        model = Transformer(config)
    model = model.to(dtype).to_empty(device="cuda").requires_grad_(dtype == torch.float32)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, p.shape[1] ** -0.5) if p.dim() > 1 else p.fill_(1)
    return model


def on_clock(repeat: int, function, *arguments) -> float:
    """Seconds per call, after a first one that sets things up."""
    function(*arguments)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(1 if TINY else repeat):
        function(*arguments)
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / (1 if TINY else repeat)


def bench_gpu() -> None:
    """Numbers are printed as they come, for people, and for each part as a line of JSON."""
    choose_device("cuda")
    card, found = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}, {}
    print(*card.values(), "; MFU and shares are of the rates of the product and the copy")
    for part in (limits_of_card, decoding_on_card, sampling_on_card, learning_on_card, loss_on_card, step_on_card):
        start, new = time.perf_counter(), {}
        try:
            for name, x in part(found):
                new[name] = found[name] = x
                goal = f"   goal: at least {GOALS[name]}" if name in GOALS else ""
                print(f"  {name:50} {x:12,.4g}{goal}", flush=True)
        except Exception:  # the others may run  # noqa: BLE001
            traceback.print_exc(file=sys.stdout)
        finally:
            print(json.dumps(card | new | {f"seconds of {part.__name__}": time.perf_counter() - start}), flush=True)
        gc.collect()
        torch.cuda.empty_cache()


def limits_of_card(found: dict) -> Iterator[tuple[str, float]]:
    """What a large copy (read and written) and a large product reach."""
    n, m = (2**10, 2**6) if TINY else (2**30, 2**13)
    a, b = torch.zeros(2, n, device="cuda", dtype=torch.bfloat16)
    c = torch.randn(m, m, device="cuda").bfloat16()
    yield "copy, GB/s", 4 * n / on_clock(20, a.copy_, b) / 1e9
    yield "product, TFLOP/s", 2 * m**3 / on_clock(20, torch.mm, c, c) / 1e12


def decoding_on_card(found: dict) -> Iterator[tuple[str, float]]:
    """Reading a row token by token with the cache against reading it whole; graphs against none, with fresh inputs."""
    rows, P, T = (2, 5, 12) if TINY else (8, 200, 264)
    llama = {"hidden_size": 72, "intermediate_size": 96, "vocab_size": 704} if TINY else {}
    for config in (qwen3("1.7B", layers=6), LlamaConfig(**SMOLLM2 | llama, num_hidden_layers=6)):
        for dtype in (torch.float32, torch.bfloat16):
            words = f"{config.model_type}, {dtype}".replace("torch.", "")
            model = on_card(config, dtype).requires_grad_(False)
            tokens, at = torch.randint(500, (rows, T), device="cuda"), torch.full((rows,), P, device="cuda")
            whole, cache = model(tokens)[:, -1].double(), cache_for(model, rows, T)
            cache.write_prompts(torch.arange(rows, device="cuda"))
            model(tokens[:, :P], cache=cache)
            for t in range(P, T):
                cache.write_at(at + (t - P), cache.k.shape[3])
                last = model(tokens[:, t : t + 1], (at + (t - P))[:, None], cache)[:, 0]
            yield f"decode, error, {words}", float((last.double() - whole).norm() / whole.norm())
            uniform, drawn = torch.rand(3, rows, device="cuda", dtype=torch.float64), []
            for model.graphs in (None, {}):  # what is recorded is started again, on other tokens
                drawn += [torch.stack([next_tokens(model, tokens[:, i], at + i, uniform[i], cache.k.shape[3],
                                                   (1.0, None, None)).clone() for i in range(3)])]
            yield f"graphs, error, {words}", float((drawn[0] != drawn[1]).double().mean())


def sampling_on_card(found: dict) -> Iterator[tuple[str, float]]:
    """Of the 1.7B shape: decode steps in the middle of a response, and the reading of prompts."""
    config, rate = qwen3("1.7B"), found.get("product, TFLOP/s", math.nan) * 1e12
    model, length, weights = on_card(config, torch.bfloat16), 64 if TINY else 768, 2 * count_parameters(config)
    model.vocab = REAL_IDS
    for rows in (64, 8, 1):
        cache = cache_for(model, rows, length)
        moved = weights + 2 * 2 * cache.k[:, :rows, :, :length].numel()
        token = torch.full((rows,), 7, device="cuda")
        at, uniform = torch.full_like(token, length - 1), torch.full((rows,), 0.5, device="cuda", dtype=torch.float64)
        for graphs, words in ((None, ""), ({}, ", graphs")):
            model.graphs = graphs
            taken = on_clock(20, next_tokens, model, token, at, uniform, length, (1.0, None, None))
            yield f"decode {rows} rows{words}, tokens/s", rows / taken
            share = moved / taken / found.get("copy, GB/s", math.nan) / 1e9
            yield f"decode {rows} rows{words}, share of bandwidth", share
    b, T = (2, 32) if TINY else (64, 256)
    tokens, read = torch.randint(500, (b, T), device="cuda"), torch.full((b,), T)
    cache.write_prompts(torch.arange(b, device="cuda"))
    taken = on_clock(5, model.forward, tokens, None, cache)
    yield "prefill, tokens/s", b * T / taken
    yield "prefill, MFU", count_flops(config, read, 0) / taken / rate


def learning_on_card(found: dict) -> Iterator[tuple[str, float]]:
    """The two forwards of learning and the student's backward, without heads: 1.7B from 8B."""
    b, T = (2, 32) if TINY else (4, 1280)
    tokens, read = torch.randint(500, (b, T), device="cuda"), torch.full((b,), T)
    student, teacher = on_card(qwen3("1.7B")), on_card(qwen3("8B"), torch.bfloat16)

    def learn() -> None:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            hidden = student(tokens)
        hidden.backward(hidden.detach())

    rate = found.get("product, TFLOP/s", math.nan) * 1e12
    yield "teacher, MFU", count_flops(teacher.config, read, 0) / on_clock(5, teacher, tokens) / rate
    yield "student, MFU", 3 * count_flops(student.config, read, 0) / on_clock(5, learn) / rate


def loss_on_card(found: dict) -> Iterator[tuple[str, float]]:
    """The reverse KL of 4,096 rows at the heads of 1.7B and 8B, of all ids and of those that are tokens, an odd number;
    value and gradient of 64 rows against float64."""
    n, (v, h, h_t) = (128, (704, 64, 128)) if TINY else (4096, (151_936, 2048, 4096))
    made = [torch.randn(*size, device="cuda").mul_(scale).bfloat16()
            for size, scale in (((n, h), 1), ((v, h), 3 / h**0.5), ((n, h_t), 1), ((v, h_t), 3 / h_t**0.5))]

    def differentiate(hidden, head, hidden_t, head_t, vocab=REAL_IDS) -> list[torch.Tensor]:
        leaves = [hidden.detach().requires_grad_(), head.detach().requires_grad_()]
        loss = distill_loss(*leaves, hidden_t, head_t, vocab=vocab)[0]
        loss.backward()
        return [loss.detach(), *(x.grad for x in leaves)]

    for ids, words in ((v, ""), (REAL_IDS, f", {REAL_IDS} ids")):
        taken = on_clock(5, differentiate, made[0], made[1].float(), *made[2:], ids)
        yield f"loss{words}, TFLOP/s", 2 * n * ids * (3 * h + h_t) / taken / 1e12
    few = [made[0][:64], made[1].float(), made[2][:64], made[3]]
    for name, x, y in zip(("value", "gradient of the hidden states", "gradient of the head"),
                          differentiate(*few), differentiate(*(x.double() for x in few))):
        yield f"loss, error of the {name}", float((x.double() - y).norm() / y.norm())


def step_on_card(found: dict) -> Iterator[tuple[str, float]]:
    """A few steps of training, 0.6B from 1.7B, without and with graphs: speed, and peak memory against --plan."""
    steps, batch, cap = (1, 2, 4) if TINY else (3, 16, 512)
    with tempfile.TemporaryDirectory() as folder:
        for name, shape, dtype in (("student", "0.6B", torch.float32), ("teacher", "1.7B", torch.bfloat16)):
            on_card(qwen3(shape), dtype).save_pretrained(Path(folder) / name)
            wide_tokenizer(Path(folder) / name, REAL_IDS)
        for graphs, words in ((False, ""), (True, ", graphs")):
            config = train.Config(
                student=f"{folder}/student", teacher=f"{folder}/teacher", data="chains", prefix_len=cap,
                batch_size=batch, max_new_tokens=cap, steps=steps, lr=1e-6, eval_problems=0, eval_kl=0,
                out_dir=f"{folder}/run{graphs}", device="cuda", compile=graphs)
            with contextlib.redirect_stdout(io.StringIO()):
                planned = max(train.plan(config).values())
            gc.collect()
            torch.cuda.reset_peak_memory_stats()
            with (mock.patch.object(Run, "save", lambda self: None),  # 7 GB
                  mock.patch.dict(os.environ, TORCHDYNAMO_DISABLE="1")):
                train.train(config)
            last = read_log(Path(folder) / f"run{graphs}/log.jsonl")[-1]
            yield f"step{words}, seconds sampling", last["seconds_sample"]
            yield f"step{words}, seconds scoring and learning", last["seconds_learn"]
            yield f"step{words}, tokens/s", last["tokens_per_s"]
            peak = max(r["peak_memory"] for r in read_log(Path(folder) / f"run{graphs}/log.jsonl"))
            yield f"step{words}, peak memory of what --plan says", peak / planned


if __name__ == "__main__":
    benches = {"loss": bench_loss, "loss_memory": loss_memory, "sample": bench_sample, "step": bench_step,
               "ranks": bench_ranks, "gpu": bench_gpu}
    if len(sys.argv) < 2 or sys.argv[1] not in benches:
        sys.exit("usage: python tests/bench.py loss|sample|step|ranks|gpu")
    torch.manual_seed(0)
    benches[sys.argv[1]](*sys.argv[2:])
