"""Measurements, as ratios against a peer in the same process. Run on a quiet machine; nothing here is a test.

    python tests/bench.py loss     # speed and memory of the fused reverse KL, against dense autograd and TRL
                                   # (pip install trl, if you want that column)
    python tests/bench.py sample   # tokens per second of generate, against transformers' with either cache
    python tests/bench.py step     # a whole step of training, against TRL's DistillationTrainer (pip install trl)
"""

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
from transformers import AutoModelForCausalLM, LlamaConfig

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train
from data.run import read_log
from data.tokenizer import Tokenizer
from loss import distill_loss
from model import Transformer
from sample import Decoder, generate
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


def our_tokens(decoder, prompts, cap, stops) -> int:
    return int(generate(decoder, prompts, cap, stops).lens.sum())


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
            decoder = Decoder(Transformer.from_pretrained(path))
            reference = AutoModelForCausalLM.from_pretrained(path).eval()
            reference.generation_config.eos_token_id = None
            v, stops = decoder.vocab, ()
            if length == "chains":
                tokenizer = Tokenizer(path)
                prompts, stops = [tokenizer.encode_prompt(p) for p in small], tokenizer.stop_ids
            else:
                lens = torch.randint(8, 121, (batch,), generator=g).tolist() if length is None else [length] * batch
                prompts = [torch.randint(1, v, (n,), generator=g).tolist() for n in lens]
            if natural:  # a share 4 / cap of the random model's nearly even distribution: geometric, mean cap / 4
                stops = tuple(range(v - v * 4 // cap, v))
            runs = {"ours": (our_tokens, decoder, prompts, cap, stops)}
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
            for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
                shutil.copy(chains / "teacher" / file, Path(folder) / name)
        (Path(folder) / "train.jsonl").write_text("\n".join(lines))
        best = {}
        try:
            best["trl"] = their_step(folder, [json.loads(line)["prompt"] for line in lines], batch, cap, steps)
        except ImportError:
            print("no TRL here: pip install trl")
        # train.py has the C library keep freed memory, which cannot be undone, so TRL, which does not, went first
        train.train(train.Config(
            student=f"{folder}/student", teacher=f"{folder}/teacher", data=f"{folder}/train.jsonl", prefix_len=cap,
            batch_size=batch, steps=steps, lr=1e-6, eval_problems=0, eval_kl=0, out_dir=f"{folder}/run", device="cpu",
        ))
        records = read_log(Path(folder) / "run/log.jsonl")
        best["ours"] = min((r["seconds_sample"] + r["seconds_learn"], r["tokens"]) for r in records)
    for name, (taken, tokens) in best.items():
        ratio = "" if name == "ours" else f" ({taken / best['ours'][0] * best['ours'][1] / tokens:.2f}x our time)"
        print(f"{name}: {taken:.1f} s a step, {tokens / taken:,.0f} response tokens/s{ratio}")


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
    benches = {"loss": bench_loss, "loss_memory": loss_memory, "sample": bench_sample, "step": bench_step}
    if len(sys.argv) < 2 or sys.argv[1] not in benches:
        sys.exit("usage: python tests/bench.py loss|sample|step")
    torch.manual_seed(0)
    benches[sys.argv[1]](*sys.argv[2:])
