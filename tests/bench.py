"""Measurements, as ratios against a peer on the same machine. Run on a quiet machine; nothing here is a test.

    python tests/bench.py load     # peak memory and seconds of loading a checkpoint, ours and transformers'
    python tests/bench.py loss     # speed and memory of the fused reverse KL, against dense autograd and TRL
                                   # (pip install trl, if you want that column)
    python tests/bench.py sample   # tokens per second of generate, against transformers' with either cache
    python tests/bench.py step     # a whole step of training, against TRL's DistillationTrainer (pip install trl)
"""

import contextlib
import gc
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train
from data.books import choose_micro_batch, flop_books, keep_freed_memory
from data.tokenizer import Tokenizer
from loss import distill_loss
from model import Transformer, free_memory
from sample import generate
from tests.reference import live

LOADERS = {
    "import only": "pass",
    "model.py": "from model import Transformer; model = Transformer.from_pretrained(folder, dtype=torch.{dtype})",
    "transformers": "model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.{dtype})",
}
PROBE = r"""
import json, re, time
import torch, transformers
import transformers.models.qwen3.modeling_qwen3, model
folder = {folder!r}
start = time.perf_counter()
{load}
if "import" not in {name!r}:
    total = sum(p.float().sum() for p in model.parameters())  # read every weight once
seconds = time.perf_counter() - start
peak = int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1]) * 1024  # Linux; of this process alone
print(json.dumps([peak, seconds]))
"""


def bench_load() -> None:
    config = Qwen3Config(
        vocab_size=50_000, hidden_size=1024, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        model = Transformer(config).initialize(0)
        config.save_pretrained(folder)
        weights = {n: p.detach().bfloat16() for n, p in model.named_parameters()}
        names, index, size = list(weights), {}, 0
        for shard in range(4):
            part = {n: weights[n] for n in names[shard::4]}
            file = f"model-{shard + 1:05d}-of-00004.safetensors"
            save_file(part, Path(folder) / file, metadata={"format": "pt"})
            index |= dict.fromkeys(part, file)
            size = max(size, sum(t.numel() * 2 for t in part.values()))
        (Path(folder) / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
        count = sum(t.numel() for t in weights.values())
        print(f"{count / 1e6:.0f} M parameters, bfloat16 on disk in 4 shards, the largest {size / 2**20:.0f} MiB")
        for dtype, bytes_each in (("float32", 4), ("bfloat16", 2)):
            base = 0
            for name, load in LOADERS.items():
                code = PROBE.format(folder=folder, load=load.format(dtype=dtype), name=name)
                root = Path(__file__).resolve().parent.parent
                out = subprocess.run(
                    [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
                ).stdout
                peak, seconds = json.loads(out)
                if name == "import only":
                    base = peak
                    continue
                above = (peak - base - count * bytes_each) / 2**20
                print(
                    f"  {dtype:8} {name:12} peak {(peak - base) / 2**20:6.0f} MiB above imports, "
                    f"{above:6.0f} above the weights; {seconds:.2f} s with one read of every weight"
                )


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
            torch.randn(n, h_t), torch.randn(v, h_t).mul_(scale / h_t**0.5)]  # fmt: skip
    return [x.requires_grad_(i < 2) for i, x in enumerate(made)]


def seconds(function, *arguments, **options) -> float:
    start = time.perf_counter()
    function(*arguments, **options)
    return time.perf_counter() - start


def forward_backward(loss, inputs) -> None:
    loss(*inputs).backward()


def torch_mm(*products) -> None:
    for a, b, out in products:
        torch.mm(a, b, out=out)


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


def bench_loss(rows: str = "256,1024,4096") -> None:
    try:
        import trl

        peers = {"ours": loss_ours, "dense": loss_dense, "trl": loss_trl}
        print(f"trl {trl.__version__}: ChunkedDivergenceFunction, its torch path")
    except ImportError:
        peers = {"ours": loss_ours, "dense": loss_dense}
    memory = int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1]) * 1024  # Linux
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, float32, reverse KL, forward + backward;")
    print("best of three turns or more, in three minutes or more; share = the time of the four products by torch.mm")
    print("in the plain layout over ours; MiB = peak above the inputs, dH and dW, in a process alone")
    for name, (v, h, h_t) in LOSS_SHAPES.items():
        for n in map(int, rows.split(",")):
            inputs = loss_inputs(name, n)
            runs = {k: (forward_backward, f, inputs) for k, f in peers.items()
                    if k != "dense" or n * v * 4 * 9 < memory}  # fmt: skip
            x, w, x_t, w_t = (i.detach() for i in inputs)
            z, dw = torch.randn(n, v), torch.zeros(v, h)
            runs["mm"] = torch_mm, (x, w.T, z), (x_t, w_t.T, z), (z, w, torch.empty_like(x)), (z.T, x, dw)
            times, start = {k: [] for k in runs}, time.perf_counter()
            while len(times["ours"]) < 3 or time.perf_counter() - start < 180:  # in turns: a slow minute hits all
                for k, (f, *arguments) in runs.items():
                    for x in inputs[:2]:
                        x.grad = None
                    times[k].append(seconds(f, *arguments))
            best = {k: min(t) for k, t in times.items()}
            rate = best.pop("mm")
            del z, dw, runs
            line = f"{name:8} N {n:5}: "
            for k, t in best.items():
                above = subprocess.run([sys.executable, __file__, "loss_memory", name, str(n), k], capture_output=True,
                                       text=True, check=True).stdout  # fmt: skip
                line += f"{k} {t:6.2f} s {int(above) / 2**20:6.0f} MiB"
                line += f" ({t / best['ours']:.2f}x)  " if k != "ours" else f" share {rate / t:.0%}  "
            print(line, flush=True)


def read_rate() -> float:
    """Bytes per second that this machine reads from memory: the least a decode step costs is reading the weights."""
    x = torch.ones(2**27)
    return x.nbytes / min(seconds(x.sum) for _ in range(5))


def mm_rate() -> float:
    a = torch.randn(2048, 2048)
    return 2 * 2048**3 / min(seconds(torch.mm, a, a) for _ in range(5))


def ours_tokens(model, prompts, cap, stops, seed) -> int:
    """Sample with generate of sample.py; the number of response tokens."""
    return int(generate(model, prompts, cap, stops, generator=torch.Generator().manual_seed(seed)).lens.sum())


def their_tokens(reference, prompts, cap, stops, cache, seed) -> int:
    """Sample with transformers, padded on the left as it needs; the number of tokens up to each row's stop."""
    torch.manual_seed(seed)
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


def bench_sample(only: str = "") -> None:
    shape = {"vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
             "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
             "max_position_embeddings": 8192}  # fmt: skip
    chains = Path(__file__).resolve().parent.parent / "data/chains"
    rate, speed = read_rate(), mm_rate()
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {torch.get_num_threads()} threads, "
          f"float32; memory read at {rate / 1e9:.1f} GB/s, torch.mm at {speed / 1e9:.0f} GFLOP/s")
    g = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        live(LlamaConfig(**shape), seed=0).save_pretrained(folder)
        small = [json.loads(line)["prompt"] for line in (chains / "test.jsonl").read_text().splitlines()[:64]]
        jobs = [(f"SmolLM2 shape, batch {b}", folder, b, 64, 128, False) for b in (1, 8, 32)]
        jobs += [("SmolLM2 shape, batch 32, ragged, natural lengths", folder, 32, None, 128, True),
                 ("embedded teacher, batch 64", chains / "teacher", 64, "chains", 256, False)]
        for name, path, batch, length, cap, natural in jobs:
            if only not in name:
                continue
            ours = Transformer.from_pretrained(path)
            reference = AutoModelForCausalLM.from_pretrained(path).eval()
            reference.generation_config.eos_token_id = None
            v, stops = ours.head.shape[0], ()
            if length == "chains":
                tokenizer = Tokenizer(path)
                prompts, stops = [tokenizer.encode_prompt(p) for p in small], tokenizer.stop_ids
            else:
                lens = torch.randint(8, 121, (batch,), generator=g).tolist() if length is None else [length] * batch
                prompts = [torch.randint(1, v, (n,), generator=g).tolist() for n in lens]
            if natural:  # a share 4 / cap of the random model's nearly even distribution: geometric, mean cap / 4
                stops = tuple(range(v - v * 4 // cap, v))
            runs = {"ours": (ours_tokens, ours, prompts, cap, stops),
                    "generate": (their_tokens, reference, prompts, cap, stops, None),
                    "static": (their_tokens, reference, prompts, cap, stops, "static")}  # fmt: skip
            speeds = {k: [] for k in runs}
            for seed in range(2):
                for k, (run, *arguments) in runs.items():
                    start = time.perf_counter()
                    count = run(*arguments, seed)
                    speeds[k].append(count / (time.perf_counter() - start))
            best = {k: max(x) for k, x in speeds.items()}
            weights = sum(p.numel() for p in ours.parameters())
            step = batch / best["ours"]  # seconds of a decode step, the prefill included
            line = f"{name}: ours {best['ours']:,.0f} tok/s"
            if not stops:
                line += (f" ({step * 1e3:.0f} ms a step; reading all weights takes {4 * weights / rate / step:.0%} "
                         f"of it, their FLOP at torch.mm's rate {2 * weights * batch / speed / step:.0%})")
            peer = max(best["generate"], best["static"])
            print(f"{line}; generate {best['generate']:,.0f}, static cache {best['static']:,.0f}: "
                  f"{best['ours'] / peer:.2f}x", flush=True)


def bench_step(batch: str = "16", cap: str = "128", steps: str = "3") -> None:
    batch, cap, steps = int(batch), int(cap), int(steps)
    shape = {"vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9,
             "num_key_value_heads": 3, "tie_word_embeddings": True, "max_position_embeddings": 8192}  # fmt: skip
    chains = Path(__file__).resolve().parent.parent / "data/chains"
    texts = [json.loads(line)["prompt"] for line in (chains / "test.jsonl").read_text().splitlines()[: batch * steps]]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, float32; "
          f"student 24 and teacher 30 layers of the SmolLM2 shape, batch {batch}, cap {cap}")
    with tempfile.TemporaryDirectory() as folder:
        for name, layers in (("student", 24), ("teacher", 30)):
            live(LlamaConfig(**shape, num_hidden_layers=layers), seed=0).save_pretrained(Path(folder) / name)
            for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
                shutil.copy(chains / "teacher" / file, Path(folder) / name)
        best = {}
        try:
            best["trl"] = their_step(folder, texts, batch, cap, steps)
        except ImportError:
            print("no TRL here: pip install trl")
        keep_freed_memory(torch.device("cpu"))  # as train.py does. It cannot be undone, so TRL went first: its users
        best["ours"] = our_step(folder, texts, batch, cap, steps)  # have no such line (it would help them too)
    for name, (taken, tokens) in best.items():
        ratio = "" if name == "ours" else f" ({taken / best['ours'][0] * best['ours'][1] / tokens:.2f}x our time)"
        print(f"{name}: {taken:.1f} s a step, {tokens / taken:,.0f} response tokens/s{ratio}")


def our_step(folder, texts, batch, cap, steps) -> tuple[float, int]:
    """The loop of train.py without its logging: (seconds of the fastest step, response tokens of a step)."""
    config = train.Config(prefix_len=cap, batch_size=batch, dtype="float32")
    tokenizer = Tokenizer(Path(folder) / "student")
    student, teacher = (Transformer.from_pretrained(Path(folder) / name) for name in ("student", "teacher"))
    teacher.requires_grad_(False)
    rows = [{"prompt": t, "prompt_ids": tokenizer.encode_prompt(t)} for t in texts]
    longest = max(len(r["prompt_ids"]) for r in rows) + cap
    free = free_memory(student.head.device)
    config.micro_batch = choose_micro_batch(config, student.config, teacher.config, longest, free)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-6, fused=True)
    taken = []
    for step in range(steps):
        rate = mm_rate()  # measured before and after each step, since the machine is not always equally fast
        clock, start = {"sample": 0.0, "teacher": 0.0, "student": 0.0}, time.perf_counter()
        part = rows[step * batch :][:batch]
        rollout, wrote = train.respond(part, step, cap, config, student, teacher, tokenizer, (2,),
                                       49_152, torch.Generator().manual_seed(step))  # fmt: skip
        clock["sample"] = time.perf_counter() - start
        train.train_on(rollout, student, teacher, config, 49_152, (2,), contextlib.nullcontext, clock)
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        taken.append(time.perf_counter() - start)
        flop = {"sample": wrote["flop_sample"]} | {
            k.removeprefix("flop_"): v for k, v in flop_books(rollout, student.config, teacher.config).items()}
        rate = (rate + mm_rate()) / 2
        share = sum(flop.values()) / taken[-1] / rate
        print(f"ours, step {step}: {taken[-1]:.1f} s, {sum(flop.values()) / 1e9:,.0f} GFLOP at {share:.0%} of "
              f"torch.mm's {rate / 1e9:.0f} GFLOP/s: " + ", ".join(
            f"{k} {clock[k]:.1f} s at {flop[k] / clock[k] / rate:.0%}" for k in clock), flush=True)
    return min(taken), int(rollout.lens.sum())


def their_step(folder, texts, batch, cap, steps) -> tuple[float, int]:
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
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
        max_steps=steps, learning_rate=1e-6, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none",
        save_strategy="no", disable_tqdm=True, logging_steps=1000,
    )
    DistillationTrainer(
        model=models[0], teacher_model=models[1], args=options, train_dataset=Dataset.from_dict({"prompt": texts}),
        processing_class=tokenizer, callbacks=[Clock()],
    ).train()
    return min(Clock.taken), batch * cap


if __name__ == "__main__":
    benches = {"load": bench_load, "loss": bench_loss, "loss_memory": loss_memory, "sample": bench_sample,
               "step": bench_step}
    if len(sys.argv) < 2 or sys.argv[1] not in benches:
        sys.exit("usage: python tests/bench.py load|loss|sample|step")
    torch.manual_seed(0)
    benches[sys.argv[1]](*sys.argv[2:])
