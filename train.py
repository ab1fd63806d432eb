"""On-policy distillation from reasoning prefixes: the student writes, the teacher marks, the student learns.

    python train.py --prefix_len 1024               # distil the embedded pair on whatever machine this is
    python train.py --prefix_len 16 --steps 10      # the paper's point: the first tokens carry most of the lesson
    python train.py --student Qwen/Qwen3-1.7B-Base --teacher Qwen/Qwen3-8B --data my_prompts.jsonl --lr 1e-6

One step, as in arXiv 2602.15260:
    1. sample     the student answers a batch of prompts; a response is cut after `prefix_len` tokens
    2. score      the frozen teacher reads the same tokens
    3. learn      AdamW on the reverse KL from student to teacher, over the full vocabulary, at the response's positions

Where the responses come from (--rollout student | teacher | data) and what is minimised (--loss) are two independent
flags, so the same loop is also supervised fine-tuning (--rollout data --loss cross_entropy), which trained the embedded
pair, and everything in between.

Read this file from the last line upwards, or from `train` downwards.
"""

import copy
import functools
import json
import math
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from data import HERE, InputError, flag, load_jsonl, parse_flags, resolve, run_command
from data.run import find_run, load_checkpoint, open_run, read_log, save_checkpoint, summarize
from data.tokenizer import Tokenizer, check_same
from eval import by_position, evaluate, measure_kl, preflight
from loss import LOSSES, distill_loss
from model import Transformer, checkpoint_folder, choose_device, count_flops, load_config
from sample import Rollout, generate


@dataclass
class Config:
    # The pair and the data
    student: str = flag("chains/student", "checkpoint folder or hub name of the model that learns")
    teacher: str = flag("chains/teacher", "checkpoint folder or hub name of the frozen model that scores")
    init: str = flag(
        "pretrained", "pretrained, or random: only --student's configuration, with fresh weights from --seed"
    )
    data: str = flag("chains", "training prompts: a name (data/NAME/train.jsonl) or a .jsonl file")
    eval_data: str = flag(
        "", "held-out problems, a name or a .jsonl file; empty takes --data's own test split, if it has one"
    )
    chat: str = flag(
        "auto", "auto: prompts go through the student's chat template where there is one; on: demand it; off: bare"
    )
    system: str = flag("", "text of a system turn before each prompt, for checkpoints with a chat template")
    thinking: str = flag("", "on or off, for chat templates that have the switch")
    stop_tokens: str = flag(
        "", "further stop tokens besides those both checkpoints declare, comma-separated names or ids"
    )
    out_dir: str = flag("out", "where log.jsonl and the checkpoints go")
    # The method
    prefix_len: int = flag(
        1024, "cut each response after this many tokens; lower it first when memory or time runs out"
    )
    schedule: str = flag(
        "constant", "how the prefix grows from --prefix_start to --prefix_len: constant (not at all), linear, "
        "staircase, or adaptive (when its last half has been learnt)"
    )
    prefix_start: int = flag(16, "where a growing prefix starts")
    schedule_steps: int = flag(0, "steps in which linear and staircase reach --prefix_len; 0 takes --steps")
    stair: int = flag(64, "tokens a stair of the staircase")
    window: str = flag(
        "prefix", "what is supervised: the prefix, where sampling stops; or, as control experiments, the first, last "
        "or random --prefix_len tokens of responses sampled up to --max_new_tokens"
    )
    rollout: str = flag(
        "student", "who writes the responses: student (on-policy), teacher, or data (the field `solution`)"
    )
    loss: str = flag("reverse_kl", f"what is minimised: {', '.join(LOSSES)}")
    beta: float = flag(0.5, "mixture of the jsd loss, strictly between 0 and 1")
    top_k: int = flag(64, "tokens that the topk_reverse_kl loss tells apart; all others are one bucket")
    top_k_of: str = flag("teacher", "whose most likely tokens those are: teacher or student")
    temperature: float = flag(1.0, "of sampling and of both models' distributions in the loss")
    stop_class: bool = flag(True, "treat all stop tokens of both models as one outcome in the loss")
    # Optimisation
    steps: int = flag(30, "optimizer steps")
    batch_size: int = flag(64, "prompts a step")
    micro_batch: int = flag(
        16, "rows that go forward and backward at once; lower it when memory runs out, nothing else changes"
    )
    lr: float = flag(5e-4, "peak learning rate; real models want 1e-6 to 1e-5")
    lr_schedule: str = flag("constant", "constant or cosine (to zero at the last step), after the warm-up")
    warmup: int = flag(2, "steps of linear warm-up")
    weight_decay: float = flag(0.0, "AdamW's, on matrices only")
    beta1: float = flag(0.9, "AdamW's first moment")
    beta2: float = flag(0.98, "AdamW's second moment")
    grad_clip: float = flag(1.0, "largest gradient norm; 0 turns clipping off")
    # Evaluation
    eval_every: int = flag(0, "evaluate every this many steps, besides before and after; 0 is off")
    eval_problems: int = flag(500, "held-out problems to answer; 0 measures no accuracy")
    eval_kl: int = flag(
        100, "held-out prompts to measure the reverse KL on, over whole responses of the student; 0 measures none"
    )
    max_new_tokens: int = flag(512, "cap on responses in evaluation")
    # The run
    seed: int = flag(1337, "of the data order, the sampling and fresh weights")
    device: str = flag("", "cpu, cuda, cuda:1, ...; empty chooses")
    dtype: str = flag(
        "", "float32 or bfloat16 for the forward passes (the student's own weights stay float32); empty chooses"
    )
    save_every: int = flag(0, "checkpoint every this many steps, besides the last; 0 is off")
    keep: int = flag(2, "how many checkpoints stay")
    resume: bool = flag(False, "continue the run in --out_dir from its last complete checkpoint")
    overwrite: bool = flag(False, "discard the run in --out_dir")


def check_flags(config: Config) -> None:
    choices = {
        "init": ("pretrained", "random"), "rollout": ("student", "teacher", "data"), "loss": LOSSES,
        "top_k_of": ("teacher", "student"), "schedule": ("constant", "linear", "staircase", "adaptive"),
        "window": ("prefix", "first", "last", "random"), "lr_schedule": ("constant", "cosine"),
        "dtype": ("", "float32", "bfloat16"),
    }
    for name, allowed in choices.items():
        if getattr(config, name) not in allowed:
            raise InputError(f"--{name} {getattr(config, name)}: expected one of {', '.join(filter(None, allowed))}")
    for name in ("prefix_len", "steps", "batch_size", "micro_batch", "max_new_tokens", "keep", "top_k", "prefix_start",
                 "stair"):  # fmt: skip
        if getattr(config, name) < 1:
            raise InputError(f"--{name} must be at least 1, found {getattr(config, name)}")
    for name in ("warmup", "weight_decay", "grad_clip", "eval_every", "eval_problems", "eval_kl", "save_every", "seed",
                 "schedule_steps"):  # fmt: skip
        if not getattr(config, name) >= 0:
            raise InputError(f"--{name} must not be negative, found {getattr(config, name)}")
    for name in ("lr", "temperature"):
        if not 0 < getattr(config, name) < math.inf:
            raise InputError(f"--{name} must be positive, found {getattr(config, name)}")
    for name in ("beta1", "beta2"):
        if not 0 <= getattr(config, name) < 1:
            raise InputError(f"--{name} must lie in [0, 1), found {getattr(config, name)}")
    if config.loss == "jsd" and not 0 < config.beta < 1:
        raise InputError(f"--beta must lie strictly between 0 and 1, found {config.beta}")
    if config.loss == "sampled_kl" and config.rollout != "student":
        raise InputError("--loss sampled_kl estimates from the student's own samples: use it with --rollout student")
    if config.schedule != "constant" and config.prefix_start > config.prefix_len:
        raise InputError(f"--prefix_start {config.prefix_start} lies above --prefix_len {config.prefix_len}")
    if config.schedule == "adaptive" and config.loss == "cross_entropy":
        raise InputError("--schedule adaptive follows the KL to the teacher, which --loss cross_entropy lacks")
    if config.resume and config.overwrite:
        raise InputError("--resume and --overwrite contradict each other")


def batch_of(rows: list[dict], step: int, config: Config) -> list[dict]:
    """The rows of a step: a fresh permutation every epoch, a function of (seed, step) alone, so resuming needs no
    state."""
    wanted = range(step * config.batch_size, (step + 1) * config.batch_size)
    batch = []
    for epoch in range(wanted.start // len(rows), (wanted.stop - 1) // len(rows) + 1):
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(config.seed + 7919 * epoch)).tolist()
        batch += [rows[order[i % len(rows)]] for i in wanted if i // len(rows) == epoch]
    return batch


def planned_prefix(step: int, config: Config) -> int:
    """The prefix length of a step (counted from 0) by the constant, linear and staircase schedules."""
    if config.schedule == "constant":
        return config.prefix_len
    progress = min(1.0, step / max(1, (config.schedule_steps or config.steps) - 1))
    grown = round(progress * (config.prefix_len - config.prefix_start))
    if config.schedule == "staircase" and progress < 1:
        grown = grown // config.stair * config.stair
    return config.prefix_start + grown


def adapted_prefix(state: dict, kl: Tensor, position: Tensor, reached: float, config: Config) -> dict:
    """The adaptive schedule: what a step's KL (n,) at its response positions (n,) makes of its state.

    The KL of the prefix's last half is smoothed over steps. When it has not fallen by 5% below its lowest for three
    steps, what can be learnt there has been, and the prefix grows by half; but only if a quarter of the rollouts
    reached its end, for otherwise a longer one would hold little more. After adaptive FastOPD (arXiv 2607.29494), whose
    four signals this reduces to two.
    """
    length, edge = state["prefix_len"], kl[position >= state["prefix_len"] // 2]
    if not len(edge):
        return state
    smooth = edge.double().mean().item()
    smooth = smooth if state["smooth"] is None else 0.7 * state["smooth"] + 0.3 * smooth
    if state["lowest"] is None or smooth < 0.95 * state["lowest"]:
        return {"prefix_len": length, "smooth": smooth, "lowest": smooth, "waited": 0}
    if state["waited"] + 1 >= 3 and reached >= 0.25 and length < config.prefix_len:
        longer = min(config.prefix_len, math.ceil(1.5 * length))
        return {"prefix_len": longer, "smooth": None, "lowest": None, "waited": 0}
    return {**state, "smooth": smooth, "waited": state["waited"] + 1}


def supervise_window(rollout: Rollout, length: int, window: str, generator: torch.Generator) -> None:
    """Of whole responses, supervise the first, last or a random run of `length` tokens; all of a shorter one."""
    room = (rollout.lens - length).clamp(min=0)
    start = {"first": room * 0, "last": room,
             "random": (torch.rand(len(room), generator=generator, dtype=torch.float64) * (room + 1)).long()}[window]
    rollout.supervised = torch.stack((start, (start + length).minimum(rollout.lens)), dim=1)


def data_rollout(batch: list[dict], eos_id: int, prefix_len: int) -> Rollout:
    """The written solutions as if they had been sampled, cut at prefix_len like any other."""
    responses = [row["solution_ids"] + [eos_id] for row in batch]
    cut = [r[:prefix_len] for r in responses]
    sequences = [row["prompt_ids"] + r for row, r in zip(batch, cut)]
    tokens = torch.zeros(len(batch), max(map(len, sequences)), dtype=torch.long)
    for i, sequence in enumerate(sequences):
        tokens[i, : len(sequence)] = torch.tensor(sequence)
    prompt_lens = torch.tensor([len(row["prompt_ids"]) for row in batch])
    finished = torch.tensor([len(r) <= prefix_len for r in responses])
    lens = torch.tensor([len(r) for r in cut])
    return Rollout(tokens, prompt_lens, lens, finished, logprobs=torch.empty(0), forced_lens=lens)


def train_on(
    rollout: Rollout, student: Transformer, teacher: Transformer | None, config: Config, vocab: int,
    stop_ids: tuple[int, ...], autocast, clock: dict,
) -> dict:
    """Accumulate the gradient of one step's loss over its micro-batches. Returns the statistics of every supervised
    row.

    Each row is weighted by 1 / (supervised tokens of the whole step), so the gradient does not depend on how the step
    is split. A response's own positions are all that is supervised: the stop token if the student drew it, no invented
    stop where the prefix was cut, never the prompt.
    """
    device, half = student.head.device, config.dtype == "bfloat16"
    supervised = rollout.num_supervised()
    stats: dict[str, list] = {}
    for tokens, mask, position in rollout.micro_batches(config.micro_batch):
        tokens, mask = tokens.to(device), mask.to(device)
        hidden_t = head_t = None
        start = tick(device)
        if teacher is not None:
            with torch.no_grad():
                hidden_t, head_t = teacher(tokens[:, :-1])[mask], teacher.head
        clock["teacher"] += tick(device) - start
        start = tick(device)
        with autocast():
            hidden_s = student(tokens[:, :-1])[mask]
        loss, row_stats = distill_loss(
            hidden_s.bfloat16() if half else hidden_s, student.head, hidden_t, head_t, loss=config.loss,
            temperature=config.temperature, beta=config.beta, top_k=config.top_k, top_k_of=config.top_k_of,
            targets=tokens[:, 1:][mask], vocab=vocab,
            token_weights=torch.full((len(hidden_s),), 1.0 / supervised, device=device, dtype=student.head.dtype),
            stop_ids=stop_ids if config.stop_class and teacher is not None else (),
        )
        loss.backward()
        clock["student"] += tick(device) - start
        for name, value in {**row_stats, "position": position}.items():
            stats.setdefault(name, []).append(value.cpu())
    return {name: torch.cat(values) for name, values in stats.items()}


def update_norm(optimizer) -> float:
    """L2 norm of the last AdamW step over all weights, decay aside. Beside a vanishing gradient norm this staying up is
    the sign that Adam's normalisation is moving the weights on noise."""
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


def flop_books(rollout: Rollout, sampler, student, teacher) -> dict[str, float]:
    """Matmul FLOP of one step, of the tokens really handled, padding not counted: sampling, teacher, student."""
    read = rollout.prompt_lens.double() + rollout.spans()[:, 1] - 1  # up to the last supervised token, not fed back
    pairs, tokens, heads = (read * (read + 1) / 2).sum().item(), read.sum().item(), rollout.num_supervised()
    return {
        "flop_sample": 0.0 if sampler is None else count_flops(
            sampler.config, rollout.prefilled + rollout.decoded, rollout.pairs, int(rollout.lens.sum())
        ),
        "flop_teacher": count_flops(teacher.config, tokens, pairs, heads) if teacher is not None else 0.0,
        "flop_student": 3 * count_flops(student.config, tokens, pairs, heads),
    }


def learning_rate(step: int, config: Config) -> float:
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.lr_schedule == "constant":
        return config.lr
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * 0.5 * (1 + math.cos(math.pi * progress))


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
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if os.uname().sysname == "Darwin" else peak * 1024


def train(config: Config) -> None:
    check_flags(config)
    device = choose_device(config.device)
    config.dtype = config.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    resume_from = find_run(config)
    dtype = getattr(torch, config.dtype)
    half = dtype != torch.float32

    # The data: prompts to train on, problems to be judged on.
    rows = load_jsonl(
        resolve(config.data, "train"), need=("prompt", "solution") if config.rollout == "data" else ("prompt",)
    )
    test = []
    if (config.eval_problems or config.eval_kl) and (config.eval_data or (HERE / config.data).is_dir()):
        need = ("prompt", "answer") if config.eval_problems else ("prompt",)
        test = load_jsonl(resolve(config.eval_data or config.data, "test"), need)

    # The pair. The student's weights are float32 for the optimizer: at a rate of 1e-6 a bfloat16 weight would round
    # back to what it was. In half precision the rollouts use a copy, refreshed every step.
    student_folder = checkpoint_folder(config.student)
    tokenizer, teacher = Tokenizer(student_folder, config.chat, config.system, config.thinking), None
    vocab, stop_ids = tokenizer.vocab_size, {*tokenizer.stop_ids, *tokenizer.stop_ids_of(config.stop_tokens)}
    if config.rollout == "teacher" or config.loss != "cross_entropy":
        teacher_folder = checkpoint_folder(config.teacher)
        teacher_tokenizer = Tokenizer(teacher_folder, "off" if config.chat == "off" else "auto")
        if teacher_tokenizer.chats():
            teacher_tokenizer = Tokenizer(teacher_folder, config.chat, config.system, config.thinking)
        check_same(tokenizer, teacher_tokenizer)
        vocab = min(vocab, teacher_tokenizer.vocab_size)
        stop_ids |= set(teacher_tokenizer.stop_ids)
        teacher = Transformer.from_pretrained(teacher_folder, device, dtype).requires_grad_(False)
    stop_ids = tuple(sorted(i for i in stop_ids if i < vocab))
    if resume_from is None and config.init == "random":
        student = Transformer(load_config(student_folder)).initialize(config.seed).to(device)
    else:
        student = Transformer.from_pretrained(resume_from or student_folder, device, torch.float32)
    sampler = copy.deepcopy(student).to(dtype).requires_grad_(False) if half else student

    autocast = functools.partial(torch.autocast, device.type, dtype=dtype, enabled=half)
    scorer = teacher if config.loss != "cross_entropy" else None  # cross-entropy looks at tokens only

    matrices = [p for p in student.parameters() if p.dim() > 1]
    vectors = [p for p in student.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=config.lr, betas=(config.beta1, config.beta2), fused=True,
    )
    first_step, totals = 0, {"tokens_sampled": 0, "tokens_scored": 0, "tokens_trained": 0, "flop": 0.0, "seconds": 0.0}
    growth = {"prefix_len": config.prefix_start, "smooth": None, "lowest": None, "waited": 0}  # see adapted_prefix
    if resume_from is not None:
        first_step, totals, growth = load_checkpoint(resume_from, student, optimizer)

    for row in tqdm(rows, desc="tokenize", leave=False, delay=2):
        row["prompt_ids"] = tokenizer.encode_prompt(row["prompt"])
        if config.rollout == "data":
            row["solution_ids"] = tokenizer.encode(row["solution"])
        if not row["prompt_ids"]:
            raise InputError(f"--data {config.data}: a prompt is empty, and this tokenizer puts nothing before it")
    longest = max(len(row["prompt_ids"]) for row in rows)
    for name, model in (("student", student), ("teacher", teacher)):
        if model is not None and vocab > model.head.shape[0]:
            raise InputError(f"--{name}: its tokenizer has {vocab} ids, its head {model.head.shape[0]} rows")
        flag_name = "prefix_len" if config.window == "prefix" else "max_new_tokens"
        cap = getattr(config, flag_name)
        if model is not None and longest + cap > model.config.max_position_embeddings:
            raise InputError(
                f"--{flag_name} {cap} and the longest prompt of --data, {longest} tokens, exceed the "
                f"{model.config.max_position_embeddings} positions of the model: lower the one or shorten the other"
            )
    rate = matmul_rate(device, dtype)

    print(
        f"student {student_folder.name}: {sum(p.numel() for p in student.parameters()):,} parameters, float32", end=""
    )
    print(
        f"; teacher {teacher_folder.name}: {sum(p.numel() for p in teacher.parameters()):,}, {config.dtype}"
        if teacher
        else ""
    )
    print(f"vocabulary {vocab:,} of {student.head.shape[0]:,} rows; stop tokens "
          + ", ".join(f"{i} {tokenizer.decode([i])!r}" for i in stop_ids)
          + (" (one class)" if config.stop_class and len(stop_ids) > 1 else ""))
    print(f"{len(rows):,} prompts, {len(test):,} held-out; {device}, torch.mm at {rate / 1e9:,.0f} GFLOP/s")
    if teacher is not None and resume_from is None:
        lines, warnings = preflight(
            student, teacher, tokenizer, teacher_tokenizer, [row["prompt"] for row in batch_of(rows, 0, config)[:16]],
            stop_ids=stop_ids, vocab=vocab, stop_class=config.stop_class, max_new_tokens=min(config.prefix_len, 256),
            seed=config.seed,
        )
        print("\n".join(lines + [f"WARNING: {w}" for w in warnings]))
    else:
        print(f"first prompt as the model sees it: {tokenizer.decode(rows[0]['prompt_ids'])!r}")

    open_run(config, None if resume_from is None else first_step)
    log_path = Path(config.out_dir) / "log.jsonl"

    def log(record: dict) -> None:
        with open(log_path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def judge(model: Transformer, name: str, step: int) -> str:
        """Evaluate on held-out data, log it, and say it in a line. Has generators of its own."""
        said = []
        for manner, temperature in (("greedy", 0.0), ("sampled", config.temperature)) if config.eval_problems else ():
            if name == "teacher" and manner == "sampled":
                continue
            found, _ = evaluate(
                model,
                tokenizer,
                test[: config.eval_problems],
                max_new_tokens=config.max_new_tokens,
                temperature=temperature,
                batch_size=config.batch_size,
                vocab=vocab,
                stop_ids=stop_ids,
                progress=True,
            )
            log({"step": step, "eval": name, "manner": manner, **found})
            said.append(f"{manner} accuracy {found['accuracy']:.3f}")
        if config.eval_kl and teacher is not None and name == "student":
            found = measure_kl(
                model, teacher, [tokenizer.encode_prompt(row["prompt"]) for row in test[: config.eval_kl]],
                max_new_tokens=config.max_new_tokens, temperature=config.temperature, vocab=vocab, stop_ids=stop_ids,
                stop_class=config.stop_class, micro_batch=config.micro_batch, batch_size=config.batch_size,
            )
            log({"step": step, "eval": "student", "manner": "kl", **found})
            said.append(f"held-out KL {found['kl']:.4f} nats a token")
        return ", ".join(said)

    if test and resume_from is None and config.init != "random":
        if teacher is not None and config.eval_problems:
            print(f"teacher: {judge(teacher, 'teacher', 0)}")
        print(f"student before the first step: {judge(sampler, 'student', 0)}")

    interrupted = []
    signal.signal(
        signal.SIGINT, lambda *_: interrupted.append(1) if not interrupted else signal.default_int_handler(*_)
    )
    bar = tqdm(range(first_step, config.steps), initial=first_step, total=config.steps, desc="train")
    for step in bar:
        clock = {"sample": 0.0, "teacher": 0.0, "student": 0.0}
        begin = tick(device)
        batch = batch_of(rows, step, config)
        prefix_len = growth["prefix_len"] if config.schedule == "adaptive" else planned_prefix(step, config)
        cap = prefix_len if config.window == "prefix" else config.max_new_tokens
        generator = torch.Generator().manual_seed(config.seed + 104729 * (step + 1))

        # 1. sample: whoever writes the responses, at most prefix_len tokens each
        if config.rollout == "data":
            rollout, writer = data_rollout(batch, tokenizer.eos_id, cap), None
        else:
            writer = sampler if config.rollout == "student" else teacher
            rollout = generate(
                writer, [row["prompt_ids"] for row in batch], cap, stop_ids, config.temperature, generator=generator,
                vocab=vocab,
            )
        if config.window != "prefix":
            supervise_window(rollout, prefix_len, config.window, generator)
        clock["sample"] = tick(device) - begin

        # 2. score and 3. learn
        stats = train_on(rollout, student, scorer, config, vocab, stop_ids, autocast, clock)
        start = tick(device)
        grad_norm = float(torch.nn.utils.clip_grad_norm_(student.parameters(), config.grad_clip or math.inf))
        loss = stats["loss"].double().mean().item()
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise RuntimeError(f"step {step}: loss {loss}, gradient norm {grad_norm}; the last checkpoint stands")
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if half:
            with torch.no_grad():
                for low, full in zip(sampler.parameters(), student.parameters()):
                    low.copy_(full)
        clock["student"] += tick(device) - start
        seconds = tick(device) - begin

        # The books.
        n, flop = rollout.num_supervised(), flop_books(rollout, writer, student, scorer)
        totals["tokens_sampled"] += int(rollout.lens.sum()) if writer is not None else 0
        totals["tokens_scored"] += n if scorer is not None else 0
        totals["tokens_trained"] += n
        totals["flop"] += sum(flop.values())
        totals["seconds"] += seconds
        mean = {k: v.double().mean().item() for k, v in stats.items() if k != "position"}
        log({
            "step": step + 1, "prefix_len": prefix_len, **mean,
            "kl_by_position": by_position(stats["kl"], stats["position"]) if "kl" in stats else {},
            "finish": rollout.finished.double().mean().item(), "capped": 1 - rollout.finished.double().mean().item(),
            "response_len": rollout.lens.double().mean().item(), "tokens": n, **flop,
            **{f"seconds_{k}": v for k, v in clock.items()}, "tokens_per_s": n / seconds,
            "flop_per_s": sum(flop.values()) / seconds, "matmul_share": sum(flop.values()) / seconds / rate,
            "peak_memory": peak_memory(device), "lr": learning_rate(step, config), "grad_norm": grad_norm,
            "update_norm": update_norm(optimizer), **{f"total_{k}": v for k, v in totals.items()},
        })
        bar.set_postfix_str(
            f"loss {loss:.4f}, KL/token {mean.get('kl', math.nan):.4f}, prefix_len {prefix_len}, "
            f"{n / seconds:,.0f} tok/s"
        )

        if config.schedule == "adaptive":
            reached = (rollout.lens >= prefix_len).double().mean().item()
            growth = adapted_prefix(growth, stats["kl"], stats["position"], reached, config)

        last = step + 1 == config.steps or bool(interrupted)
        if test and config.eval_every and (step + 1) % config.eval_every == 0 and not last:
            bar.write(f"step {step + 1}: {judge(sampler, 'student', step + 1)}")
        if last or (config.save_every and (step + 1) % config.save_every == 0):
            saved = save_checkpoint(config, student, tokenizer, stop_ids, optimizer, step + 1, totals, growth)
        if last:
            break
    bar.close()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if first_step >= config.steps:
        print(f"the run in {config.out_dir} has its {config.steps} steps already")
        saved = resume_from
    if test and not interrupted and not any("eval" in r and r["step"] >= config.steps for r in read_log(log_path)):
        judge(sampler, "student", config.steps)
    summarize(log_path, saved, bool(interrupted))


if __name__ == "__main__":
    run_command(train, parse_flags(Config, __doc__))
