"""The books: what a run takes in FLOP, memory and time, counted from the configurations or measured here.

`config` is train.py's Config throughout; student and teacher are configurations of models, not models.
"""

import ctypes
import math
import os
import re
import sys
import time
from pathlib import Path

import torch

from data import InputError
from data.prefix import longest_response
from data.run import teacher_needed, teacher_writes
from loss import ROOM, sizes
from model import ONEDNN, Transformer, checkpoint_folder, choose_device, free_memory, head_dim_of, load_config
from sample import Rollout


def count_flops(config, new_tokens: float, pairs: float, head_rows: float) -> float:
    """Matmul FLOP of one forward pass: 2 per weight and token, attention, and the head where it is applied.

    new_tokens: tokens that go through the layers. pairs: (query, key) pairs attended, summed over rows: T(T+1)/2 for a
    causal row of T. head_rows: positions whose logits are computed. A backward pass costs twice its forward.
    """
    H, D, layers = config.hidden_size, head_dim_of(config), config.num_hidden_layers
    q_size, kv_size = config.num_attention_heads * D, config.num_key_value_heads * D
    weights = layers * (2 * H * q_size + 2 * H * kv_size + 3 * H * config.intermediate_size)
    return 2 * weights * new_tokens + 4 * layers * q_size * pairs + 2 * H * config.vocab_size * head_rows


def count_parameters(config) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in Transformer(config).parameters())


def activation_bytes(config, tokens: int, half: bool, recompute: bool = False) -> int:
    """What autograd keeps of a forward pass over `tokens` tokens, padding included: counted tensor by tensor from
    model.py, and held against the tensors saved on a CPU by a test. half: under bfloat16 autocast, where the norms'
    inputs stay float32. recompute: only each block's input is kept, and one block's insides at a time."""
    H, D, layers = config.hidden_size, head_dim_of(config), config.num_hidden_layers
    q_size, kv_size = config.num_attention_heads * D, config.num_key_value_heads * D
    norms = 4 * H + (2 * (q_size + kv_size) if config.model_type == "qwen3" else 0)  # inputs, and normalised inputs
    products = 2 * H + 2 * (q_size + kv_size) + 4 * config.intermediate_size  # inputs of a linear or of attention
    block = 4 * norms + (2 if half else 4) * products
    return tokens * (layers * 4 * H + block if recompute else layers * block) + tokens * 4 * 2 * H


def memory_parts(
    student, teacher, *, batch: int, micro_batch: int, tokens: int, half: bool, recompute: bool = False,
    writers: tuple = (),
) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes that a training step takes, by part, at its two peaks: (while sampling, while learning).

    student, teacher (or None): configurations. `batch` rows are sampled, `micro_batch` rows are learned from at once,
    of up to `tokens` tokens each, prompt and response together. writers: configurations of the models that sample, if
    not the student alone. An estimate: within 15% on a CPU by a test, never yet held against a GPU.
    """
    P, P_t = count_parameters(student), count_parameters(teacher) if teacher is not None else 0
    size, V, H, I = 2 if half else 4, student.vocab_size, student.hidden_size, student.intermediate_size
    always = {"student: float32 weights": 4 * P, "student: two AdamW moments": 8 * P}
    if half:
        always["student: bfloat16 copy that samples"] = 2 * P
    if teacher is not None:
        always["teacher"] = size * P_t
    kv = max(2 * c.num_hidden_layers * c.num_key_value_heads * head_dim_of(c) for c in writers or (student,))
    sampling = {"KV cache": batch * tokens * kv * size,
                "logits of the new tokens": batch * V * (size + 12),
                "prompts being read": min(batch * tokens, 2**14) * size * 3 * I}
    if not half:  # on a CPU
        sampling["copy of the weights that samples"] = 4 * max(map(count_parameters, writers or (student,)))
    rows = micro_batch * tokens
    budget, tile = sizes("cuda" if half else "cpu")
    logits = min(budget, (rows * V * (1 if teacher is None else 2) + ROOM * tile) * 4)
    learning = {"gradients": 4 * P, "gradient of the head, on its way": 4 * V * H * (2 if half else 1),
                "logits of a chunk, and what is done to them": logits,
                "activations kept for backward": activation_bytes(student, rows, half, recompute)
                + (2 * P if half else 0), "activations passing through": rows * size * (4 * H + 3 * I)}  # fmt: skip
    return always | sampling, always | learning


def predicted_memory(config, student, teacher, longest: int, micro_batch: int, process: int = 0):
    """(while sampling, while learning), bytes by part, if a prompt and its response take up to `longest` tokens.
    process: what the process holds without the models, where that counts too (on a CPU)."""
    parts = memory_parts(student, teacher, batch=config.batch_size, micro_batch=micro_batch, tokens=longest,
                         half=config.dtype == "bfloat16", recompute=config.recompute,
                         writers=(student, teacher) if teacher_writes(config) else ())  # fmt: skip
    return [({"Python and its libraries": process} if process else {}) | p for p in parts]


def room_for_slots(config, student, teacher, longest: int, process: int, free: float) -> int:
    """Bytes that are left for the cache and the logits while sampling, beside everything else; at least enough for an
    eighth of the batch, since a few rows at a time take forever."""
    parts = predicted_memory(config, student, teacher, longest, config.micro_batch, process)[0]
    wanted = parts.pop("KV cache") + parts.pop("logits of the new tokens")
    return int(max(free - sum(parts.values()), wanted / 8))


def say_memory(config, student, teacher, longest: int, process: int, free: float) -> None:
    """Tell how much the run may take of the `free` bytes, and warn when it is more."""
    peaks = [sum(p.values()) for p in predicted_memory(config, student, teacher, longest, config.micro_batch, process)]
    print(f"memory: up to {peaks[0] / 1e9:.2f} GB while sampling, {peaks[1] / 1e9:.2f} while learning from "
          f"{config.micro_batch} rows at once, if all responses are as long as may be; {free / 1e9:.2f} "
          + ("allowed" if config.memory else "to be had"))  # fmt: skip
    if max(peaks) > free:
        print("WARNING: that is more than there is. --help says what to lower, --plan which part is the large one")


def process_memory(device: torch.device, student: str) -> int:
    """Bytes the process holds besides the models, if they share its memory; 0 where they lie on a device, or off Linux.
    To be called before they are loaded."""
    if device.type != "cpu" or not os.path.exists("/proc/self/statm"):
        return 0
    count_parameters(load_config(checkpoint_folder(student, ("config.json",))))  # brings in most of what is imported
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return resident + (6 * 10**7 if ONEDNN else 0)  # the kernels that it compiles for decoding, see model.py


def keep_freed_memory(device: torch.device) -> None:
    """Have the C library keep what is freed for the next step instead of giving it back to the system (Linux, CPU).
    Getting a gigabyte of fresh pages takes longer than the arithmetic on them: a forward pass of 2,700 tokens through
    24 layers of width 576 took 3.2 to 6.0 s without this, and 1.8 s with it."""
    if device.type == "cpu" and sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):  # glibc, not musl
            m_trim_threshold, m_mmap_threshold = -1, -3
            libc.mallopt(m_trim_threshold, 2**31 - 1)
            libc.mallopt(m_mmap_threshold, 2**25)


def choose_micro_batch(config, student, teacher, longest: int, budget: float) -> int:
    """The most rows whose predicted memory stays within the budget (bytes). Beyond 2^14 tokens nothing gets faster."""
    rows = max(1, min(config.batch_size, 2**14 // longest))
    while rows > 1 and sum(predicted_memory(config, student, teacher, longest, rows)[1].values()) > budget:
        rows = min(rows - 1, rows * 7 // 8)
    return rows


def flop_books(rollout: Rollout, student, teacher, iw: bool = False) -> dict[str, float]:
    """Matmul FLOP of one step's scoring and learning, of the tokens really handled, padding not counted. student and
    teacher (or None) are configurations. What --recompute computes twice is counted once."""
    read = rollout.prompt_lens.double() + rollout.spans()[:, 1] - 1  # up to the last supervised token, not fed back
    read = read[(rollout.spans()[:, 1] > rollout.spans()[:, 0])]
    pairs, tokens, heads = (read * (read + 1) / 2).sum().item(), read.sum().item(), rollout.num_supervised()
    return {
        "flop_teacher": count_flops(teacher, tokens, pairs, heads * (1 + iw)) if teacher is not None else 0.0,
        "flop_student": 3 * count_flops(student, tokens, pairs, heads) + count_flops(student, 0, 0, heads * iw),
    }


def account(
    rollout: Rollout, wrote: dict, student, teacher, iw: bool, clock: dict, seconds: float, rate: float, totals: dict
) -> dict[str, float]:
    """A step's entries in the books, with `totals` brought up to date. wrote: tokens sampled and their FLOP, by whom
    ever; teacher: configuration of the model that scored, or None; rate: of torch.mm, FLOP/s."""
    flop = {"flop_sample": wrote["flop_sample"], **flop_books(rollout, student, teacher, iw)}
    n, spent = rollout.num_supervised(), sum(flop.values())
    scored = n if teacher is not None else 0
    more = {"tokens_sampled": wrote["sampled"], "tokens_scored": scored, "tokens_trained": n, "flop": spent,
            "seconds": seconds}  # fmt: skip
    for key, value in more.items():
        totals[key] += value
    return {**flop, **{f"seconds_{k}": v for k, v in clock.items()}, "tokens_per_s": n / seconds,
            "flop_per_s": spent / seconds, "matmul_share": spent / seconds / rate}  # fmt: skip


def plan(config) -> None:
    """Print parameters, memory by part, and FLOP by prefix length, from the two configurations alone."""
    try:
        prompt, whole = map(int, config.plan_lens.split(","))
    except ValueError:
        raise InputError(f"--plan_lens {config.plan_lens}: expected two numbers, such as 64,2048") from None
    device = choose_device(config.device)
    config.dtype = config.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    student, teacher = (load_config(checkpoint_folder(c, ("config.json",))) for c in (config.student, config.teacher))
    teacher = teacher if teacher_needed(config) else None
    L, longest = min(config.prefix_len, whole), min(longest_response(config), whole)
    free = config.memory * 2**30 or int(0.9 * free_memory(device))
    micro_batch = config.micro_batch or choose_micro_batch(config, student, teacher, prompt + longest, free)
    who = f"teacher {config.teacher}: {count_parameters(teacher):,}" if teacher else "no teacher"
    print(f"student {config.student}: {count_parameters(student):,} parameters; {who}\nassumed: prompts of {prompt} "
          f"tokens, whole responses of {whole}, batch {config.batch_size}, micro-batch {micro_batch}, {config.dtype}\n"
          f"\nmemory with responses of {longest} tokens, GB")
    peaks = sampling, learning = predicted_memory(config, student, teacher, prompt + longest, micro_batch,
                                                    process_memory(device, config.student))  # fmt: skip
    for part in sampling | learning:
        print(f"  {part:48}" + "".join(f"{x[part] / 1e9:10.2f}" if part in x else " " * 10 for x in peaks))
    print(f"  {'in all, while sampling and while learning':48}{sum(sampling.values()) / 1e9:10.2f}"
          f"{sum(learning.values()) / 1e9:10.2f}\n  {'allowed (--memory)' if config.memory else 'free here':48}"
          f"{free / 1e9:10.2f}")
    largest = max(peaks, key=lambda p: sum(p.values()))
    short, part = sum(largest.values()) - free, max(largest, key=largest.get)
    print(f"does not fit: {short / 1e9:.2f} GB short; the largest part is {part}" if short > 0 else "fits")

    def step_flops(length: int) -> list[float]:
        def once(model, tokens: int, heads: float) -> float:  # one reading of all prompts and responses
            fed = prompt + tokens - 1
            return config.batch_size * count_flops(model, fed, fed * (fed + 1) / 2, heads)

        sampled = length if config.window == "prefix" else longest
        read = sampled if config.window in ("last", "random") else length  # random: at most
        mix = config.mix  # of whole responses, by the teacher
        writing = {"student": lambda: (1 - mix) * once(student, sampled, sampled)
                   + (mix * once(teacher, longest, longest) if mix else 0),
                   "teacher": lambda: once(teacher, sampled, sampled),
                   "data": lambda: 0.0}[config.rollout]()  # fmt: skip

        def reading(model) -> float:
            return (1 - mix) * once(model, read, length) + mix * once(model, max(read, longest), max(length, longest))

        return [writing, reading(teacher) if config.loss != "cross_entropy" else 0.0, 3 * reading(student)]

    full = sum(step_flops(whole))
    print(f"\nTFLOP a step\n  {'prefix_len':>10} {'sampling':>12} {'teacher':>12} {'student':>12} {'all':>12}  saving")
    for length in sorted({L, whole, *(whole >> k for k in range(1, 8) if whole >> k)}):
        parts = step_flops(length)
        shown = (f"{x / 1e12:,.0f}" if x > 1e15 else f"{x / 1e12:.4g}" for x in (*parts, sum(parts)))
        print(f"  {length:10,}" + "".join(f" {x:>12}" for x in shown)
              + f"  {full / sum(parts):5.1f}x")
    if config.full_every:
        mean = sum(step_flops(L)) + (sum(step_flops(longest)) - sum(step_flops(L))) / config.full_every
        print(f"  --full_every {config.full_every}: {mean / 1e12:.4g} a step on average, {full / mean:.1f}x")
    run = config.steps * sum(step_flops(L))
    hours = f", {run / 1e14 / 3600:.1f} hours where 100 TFLOP/s are reached" if run > 3.6e16 else ""
    print(f"{config.steps} steps at {L}: {run / 1e12:,.6g} TFLOP{hours}")


def update_norm(optimizer) -> float:
    """L2 norm of the last AdamW step over all weights, decay aside: how much the weights still move when the gradient
    norm has all but vanished."""
    total = 0.0
    for group in optimizer.param_groups:
        b1, b2 = group["betas"]
        for p in group["params"]:
            state = optimizer.state.get(p)
            if state:
                t = float(state["step"])
                m, v = state["exp_avg"] / (1 - b1**t), state["exp_avg_sq"] / (1 - b2**t)
                total += float((m / (v.sqrt() + group["eps"])).square().sum()) * group["lr"] ** 2
    return math.sqrt(total)


def tick(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s that torch.mm reaches here on a square product, the yardstick for the step's own rate."""
    n = 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device, dtype=dtype)
    best = math.inf
    for _ in range(4):
        start = tick(device)
        a @ a
        best = min(best, tick(device) - start)
    return 2 * n**3 / best


def peak_memory(device: torch.device) -> int:
    """Bytes: of the device on CUDA, else of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # not getrusage: what it says starts from the peak of the process that started this one
        return int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
