"""On-policy distillation from reasoning prefixes: the student writes, the teacher marks, the student learns.

    python train.py --prefix_len 1024               # distil the embedded pair on whatever machine this is
    python train.py --prefix_len 16 --steps 10      # the paper's point: the first tokens carry most of the lesson
    python train.py --plan --prefix_len 64          # what a run would take: memory, FLOP, the saving of each prefix
    python train.py --student Qwen/Qwen3-1.7B-Base --teacher Qwen/Qwen3-8B --data my_prompts.jsonl --lr 1e-6

One step, as in arXiv 2602.15260:
    1. sample     the student answers a batch of prompts; a response is cut after `prefix_len` tokens
    2. score      the frozen teacher reads the same tokens
    3. learn      AdamW on the reverse KL from student to teacher, over the full vocabulary, at the response's positions

Where the responses come from (--rollout student | teacher | data) and what is minimised (--loss) are two independent
flags, so the same loop is also supervised fine-tuning (--rollout data --loss cross_entropy), which trained the embedded
pair, and everything in between.

When memory runs out, lower --prefix_len, then --batch_size (sampling) or --micro_batch (learning), or turn on
--recompute; --plan says which part is the large one. Read this file from the last line upwards, or from `train` down.
"""

import copy
import functools
import math
import signal
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from data import InputError, books, flag, parse_flags, run, run_command
from data.books import tick
from data.diagnose import preflight
from data.prefix import adapted_prefix, drift_warning, iw_weights, planned_prefix, supervise_window
from data.tokenizer import Tokenizer
from eval import by_position, examine
from loss import LOSSES, distill_loss
from model import Transformer, choose_device, free_memory
from sample import Rollout, generate


@dataclass
class Config:
    student: str = flag("chains/student", "checkpoint folder or hub name of the model that learns",
                        group="the pair and the data")  # fmt: skip
    teacher: str = flag("chains/teacher", "checkpoint folder or hub name of the frozen model that scores")
    init: str = flag("pretrained", "or random: only --student's configuration, with fresh weights from --seed")
    data: str = flag("chains", "training prompts: a name (data/NAME/train.jsonl) or a .jsonl file")
    eval_data: str = flag("", "held-out problems, likewise; empty takes --data's own test split, if it has one")
    chat: str = flag("auto", "through the student's chat template where there is one; on: demand it; off: bare prompts")
    system: str = flag("", "text of a system turn before each prompt, for checkpoints with a chat template")
    thinking: str = flag("", "on or off, for chat templates that have the switch")
    stop_tokens: str = flag("", "further stop tokens besides those both checkpoints declare: names or ids, with commas")
    out_dir: str = flag("out", "where log.jsonl and the checkpoints go")

    prefix_len: int = flag(1024, "cut responses after this many tokens; lower it first if memory or time runs out",
                           group="the method")  # fmt: skip
    schedule: str = flag("constant", "how the prefix grows from --prefix_start to --prefix_len: constant (not at all), "
                         "linear, staircase, or adaptive (when its last half has been learnt)")  # fmt: skip
    prefix_start: int = flag(16, "where a growing prefix starts")
    schedule_steps: int = flag(0, "steps in which linear and staircase reach --prefix_len; 0 takes --steps")
    stair: int = flag(64, "tokens a stair of the staircase")
    full_every: int = flag(0, "every this many steps, learn from whole responses (up to --max_new_tokens), which keeps "
                           "what lies beyond a short prefix in place; 0 is never")  # fmt: skip
    window: str = flag("prefix", "what is supervised: the prefix, where sampling stops; or, as control experiments, "
                       "the first, last or random --prefix_len tokens of responses of --max_new_tokens")  # fmt: skip
    rollout: str = flag("student", "who writes the responses: student (on-policy), teacher, or data (its `solution`)")
    mix: float = flag(0.0, "share of each batch whose responses the teacher writes, whole (up to --max_new_tokens), in "
                      "a run of --rollout student: keeps what lies beyond a short prefix in place")  # fmt: skip
    teacher_prefix: int = flag(0, "start each student's response with this many tokens of the teacher's, unsupervised")
    teacher_cache: str = flag("", "a .jsonl file to keep the teacher's responses in, and to take them from")
    loss: str = flag("reverse_kl", f"what is minimised: {', '.join(LOSSES)}")
    beta: float = flag(0.5, "mixture of the jsd loss, strictly between 0 and 1")
    top_k: int = flag(64, "tokens that the topk_reverse_kl loss tells apart; all others are one bucket")
    top_k_of: str = flag("teacher", "whose most likely tokens those are: teacher or student")
    iw_gamma: float = flag(0.0, "IW-OPD's soft weights in place of a hard cut: up to 1 + this for early tokens")
    temperature: float = flag(1.0, "of sampling and of both models' distributions in the loss")
    stop_class: bool = flag(True, "treat all stop tokens of both models as one outcome in the loss")

    steps: int = flag(30, "optimizer steps", group="optimisation")
    batch_size: int = flag(64, "prompts a step; lower it when memory runs out in sampling")
    lr: float = flag(5e-4, "peak learning rate; real models want 1e-6 to 1e-5")
    lr_schedule: str = flag("constant", "constant or cosine (to zero at the last step), after the warm-up")
    warmup: int = flag(2, "steps of linear warm-up")
    weight_decay: float = flag(0.0, "AdamW's, on matrices only")
    beta1: float = flag(0.9, "AdamW's first moment")
    beta2: float = flag(0.98, "AdamW's second moment")
    eps: float = flag(1e-8, "AdamW's, below which a gradient no longer makes a full step")
    grad_clip: float = flag(1.0, "largest gradient norm; 0 turns clipping off")

    eval_every: int = flag(0, "evaluate every this many steps, besides before and after; 0 is off", group="evaluation")
    eval_problems: int = flag(500, "held-out problems to answer; 0 measures no accuracy")
    eval_kl: int = flag(100, "held-out prompts to measure the reverse KL on, over whole responses of the student, or 0")
    max_new_tokens: int = flag(512, "cap on responses in evaluation, with --window and with --full_every")

    micro_batch: int = flag(0, "rows that go forward and backward at once; 0 takes what --memory holds. The result is "
                            "the same; lower it when memory runs out in learning", group="the machine")  # fmt: skip
    memory: float = flag(0.0, "GiB the run may take; 0 takes nine tenths of what is free when it starts")
    recompute: bool = flag(False, "keep only the blocks' inputs for backward: much less memory, a third more FLOP")
    compile: bool = flag(False, "torch.compile the training forwards and the decode step: minutes of warm-up")
    device: str = flag("", "cpu, cuda, cuda:1, ...; empty chooses")
    dtype: str = flag("", "float32 or bfloat16 for forward passes (the student's weights stay float32); empty chooses")

    seed: int = flag(1337, "of the data order, the sampling and fresh weights", group="the run")
    save_every: int = flag(0, "checkpoint every this many steps, besides the last; 0 is off")
    keep: int = flag(2, "how many checkpoints stay")
    resume: bool = flag(False, "continue the run in --out_dir from its last complete checkpoint")
    overwrite: bool = flag(False, "discard the run in --out_dir")
    wandb_project: str = flag("", "also log to this project of Weights & Biases (pip install wandb)")
    plan: bool = flag(False, "only print what the run would take, from the two config.json alone")
    plan_lens: str = flag("64,2048", "prompt and whole-response tokens that --plan assumes")


# --- which prompts, and who answers them


def batch_of(rows: list[dict], step: int, config: Config) -> list[dict]:
    """The rows of a step: a fresh permutation every epoch, a function of (seed, step) alone, so resuming needs no
    state."""
    wanted = range(step * config.batch_size, (step + 1) * config.batch_size)
    batch = []
    for epoch in range(wanted.start // len(rows), (wanted.stop - 1) // len(rows) + 1):
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(config.seed + 7919 * epoch)).tolist()
        batch += [rows[order[i % len(rows)]] for i in wanted if i // len(rows) == epoch]
    return batch


def respond(
    batch: list[dict], step: int, prefix_len: int, config: Config, student: Transformer, teacher: Transformer | None,
    tokenizer: Tokenizer, stop_ids: tuple[int, ...], vocab: int, generator: torch.Generator,
    cache: run.ResponseCache | None = None, room: int | None = None,
) -> tuple[Rollout, dict]:
    """1. sample: a response to every prompt of the batch, and the books of who wrote how much.

    Whatever the student does not write is given to `generate` as the start of its response: all of it (the data's
    solutions, the teacher's responses) or its first tokens (--teacher_prefix). The given start is not supervised where
    the student goes on from it. Of whole responses, a --window picks the tokens to supervise. room: bytes for the KV
    cache; where not all rows fit, they take turns.
    """
    cap = prefix_len if config.window == "prefix" else config.max_new_tokens
    whole = max(cap, config.max_new_tokens) if config.mix else cap
    prompts, given = [row["prompt_ids"] for row in batch], [[] for _ in batch]
    sampling = {"temperature": config.temperature, "generator": generator, "vocab": vocab, "memory_budget": room}
    ready = round(config.mix * len(batch)) if config.rollout == "student" else len(batch)  # rows given whole
    wrote = {"sampled": 0, "flop_sample": 0.0}

    def account(rollout: Rollout, writer: Transformer) -> Rollout:
        heads = int((rollout.lens - rollout.forced_lens).sum())
        wrote["sampled"] += heads
        wrote["flop_sample"] += books.count_flops(
            writer.config, rollout.prefilled + rollout.decoded, rollout.pairs, heads
        )
        return rollout

    def ask_teacher(rows: range, at_most: int) -> None:
        """Let the teacher write for some rows. What goes to the cache is of full length, for whoever asks next."""
        if cache is not None:
            at_most = run.longest_response(config)
        new = [i for i in rows if cache is None or tuple(prompts[i]) not in cache.responses]
        if new:
            seeds = None
            if cache is not None:  # then a response is a function of its prompt
                seeds = [(zlib.crc32(batch[i]["prompt"].encode()) + config.seed * 2**32) % 2**63 for i in new]
            rollout = account(
                generate(teacher, [prompts[i] for i in new], at_most, stop_ids, seeds=seeds, **sampling), teacher
            )
            for k, i in enumerate(new):
                given[i] = rollout.response(k)
                if cache is not None:
                    cache.add(prompts[i], given[i], step)
        for i in rows if cache is not None else ():
            given[i] = cache.responses[tuple(prompts[i])]

    if config.rollout == "data":
        given = [row["solution_ids"] + [tokenizer.eos_id] for row in batch]
    elif ready:
        ask_teacher(range(ready), whole)
    given = [g[:whole] for g in given]
    if config.teacher_prefix:
        ask_teacher(range(ready, len(batch)), config.teacher_prefix)
        given[ready:] = [g[: config.teacher_prefix] for g in given[ready:]]
    rollout = account(
        generate(student, prompts, cap, stop_ids, forced=given, compile=config.compile, **sampling), student
    )
    start = rollout.forced_lens.clone()
    start[:ready] = 0
    rollout.supervised = torch.stack((start, rollout.lens), dim=1)
    if config.window != "prefix":
        supervise_window(rollout, prefix_len, config.window, generator)
    return rollout, wrote


# --- the step


def train_on(
    rollout: Rollout, student: Transformer, teacher: Transformer | None, config: Config, vocab: int,
    stop_ids: tuple[int, ...], autocast, clock: dict, forwards: tuple | None = None,
) -> dict:
    """2. score and 3. learn: accumulate the gradient of a step's loss. Returns the statistics of every supervised row.

    Each row is weighted by 1 / (supervised tokens of the whole step), so the gradient does not depend on how the step
    is split into micro-batches. A response's own positions are all that is supervised: the stop token if the student
    drew it, no invented stop where the prefix was cut, never the prompt.
    Raises FloatingPointError when a loss is not finite, naming the micro-batch and the part it comes from.
    """
    device, half = student.head.device, config.dtype == "bfloat16"
    forward_s, forward_t = forwards or (student, teacher)
    supervised = rollout.num_supervised()
    stats: dict[str, list] = {}
    for number, (tokens, mask, position) in enumerate(rollout.micro_batches(config.micro_batch)):
        tokens, mask = tokens.to(device), mask.to(device)
        hidden_t = head_t = None
        start = tick(device)
        if teacher is not None:
            with torch.no_grad():
                hidden_t, head_t = forward_t(tokens[:, :-1])[mask], teacher.head
        clock["teacher"] += tick(device) - start
        start = tick(device)
        with autocast():
            hidden_s = forward_s(tokens[:, :-1])[mask]
        hidden_s = hidden_s.bfloat16() if half else hidden_s
        fused = functools.partial(
            distill_loss, hidden_t=hidden_t, head_t=head_t, loss=config.loss, temperature=config.temperature,
            beta=config.beta, top_k=config.top_k, top_k_of=config.top_k_of, targets=tokens[:, 1:][mask], vocab=vocab,
            stop_ids=stop_ids if config.stop_class and teacher is not None else (),
        )
        weights = torch.full((len(hidden_s),), 1.0 / supervised, device=device, dtype=student.head.dtype)
        if config.iw_gamma:
            _, seen = fused(hidden_s.detach(), student.head.detach())
            weights *= iw_weights(seen["student_logprob"] - seen["teacher_logprob"], mask, config.iw_gamma)
        loss, row_stats = fused(hidden_s, student.head, token_weights=weights)
        row_stats["loss"] = row_stats["loss"] * weights * supervised
        run.must_be_finite(row_stats["loss"], position, number, hidden_t, hidden_s)
        loss.backward()
        clock["student"] += tick(device) - start
        for name, value in {**row_stats, "position": position}.items():
            stats.setdefault(name, []).append(value.cpu())
    return {name: torch.cat(values) for name, values in stats.items()}


def learning_rate(step: int, config: Config) -> float:
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.lr_schedule == "constant":
        return config.lr
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * 0.5 * (1 + math.cos(math.pi * progress))


# --- the run


def train(config: Config) -> None:
    run.check_flags(config)
    if config.plan:
        return books.plan(config)
    device = choose_device(config.device)
    books.keep_freed_memory(device)
    config.dtype = config.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    resume_from = run.find_run(config)
    free = config.memory * 2**30 or int(0.9 * free_memory(device))
    process = books.process_memory(device, config.student)
    dtype = getattr(torch, config.dtype)
    half = dtype != torch.float32

    rows, test = run.read_prompts(config)  # before the models: these may have to be downloaded first
    student, teacher, tokenizer, theirs, vocab, stop_ids = run.load_pair(config, device, dtype, resume_from)
    longest = run.encode_prompts(config, rows, tokenizer, [m for m in (student, teacher) if m is not None])
    sampler = copy.deepcopy(student).to(dtype).requires_grad_(False) if half else student  # refreshed after every step
    scorer = teacher if config.loss != "cross_entropy" else None  # cross-entropy looks at tokens only
    autocast = functools.partial(torch.autocast, device.type, dtype=dtype, enabled=half)
    forwards = None
    if config.compile:
        forwards = tuple(torch.compile(m, dynamic=True) if m is not None else None for m in (student, scorer))
    configs = student.config, teacher.config if teacher is not None else None
    config.micro_batch = config.micro_batch or books.choose_micro_batch(config, *configs, longest, free)
    matrices = [p for p in student.parameters() if p.dim() > 1]
    vectors = [p for p in student.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True,
    )
    first_step, totals = 0, {"tokens_sampled": 0, "tokens_scored": 0, "tokens_trained": 0, "flop": 0.0, "seconds": 0.0}
    growth = {"prefix_len": config.prefix_start, "smooth": None}  # see adapted_prefix
    if resume_from is not None:
        first_step, totals, growth = run.load_checkpoint(resume_from, student, optimizer)
    cache = run.ResponseCache(config, stop_ids, first_step) if config.teacher_cache else None
    room = books.room_for_slots(config, *configs, longest, process, free)

    rate = books.matmul_rate(device, dtype)
    print(f"{len(rows):,} prompts, {len(test):,} held-out; {device}, torch.mm at {rate / 1e9:,.0f} GFLOP/s")
    books.say_memory(config, *configs, longest, process, free)
    if teacher is not None and resume_from is None:
        lines, warnings = preflight(
            student, teacher, tokenizer, theirs, [row["prompt"] for row in batch_of(rows, 0, config)[:16]],
            stop_ids=stop_ids, vocab=vocab, stop_class=config.stop_class, max_new_tokens=min(config.prefix_len, 256),
            seed=config.seed,
        )
        print("\n".join(lines + [f"WARNING: {w}" for w in warnings]))
    else:
        print(f"first prompt as the model sees it: {tokenizer.decode(rows[0]['prompt_ids'])!r}")

    log = run.open_run(config, None if resume_from is None else first_step)

    def judge(model: Transformer, name: str, step: int) -> str:
        """Evaluate on held-out data, log it, and say it in a line."""
        found, said = examine(model, teacher, name == "student", tokenizer, test, config, stop_ids, vocab)
        for record in found:
            log.write({"step": step, "eval": name, **record})
        return said

    if test and resume_from is None and config.init != "random":
        if teacher is not None and config.eval_problems:
            print(f"teacher: {judge(teacher, 'teacher', 0)}")
        print(f"student before the first step: {judge(sampler, 'student', 0)}")

    due = bool(config.eval_every and first_step and first_step % config.eval_every == 0 and first_step < config.steps)
    if test and due and not any("eval" in r and r["step"] == first_step for r in log.records()):
        print(f"step {first_step}: {judge(sampler, 'student', first_step)}")  # Ctrl-C came before it

    def save(step: int) -> Path:
        return run.save_checkpoint(config, student, tokenizer, stop_ids, optimizer, step, totals, growth)

    def kept_state(step: int) -> str:
        return f"the state before this step is in {save(step)}" if step else "no step had been made"

    before = [r for r in log.records() if "loss" in r and "kl" in r]
    first_kl, warned = before[0]["kl"] if before else None, ""
    interrupted = []
    signal.signal(
        signal.SIGINT, lambda *_: interrupted.append(1) if not interrupted else signal.default_int_handler(*_)
    )
    bar = tqdm(range(first_step, config.steps), initial=first_step, total=config.steps, desc="train")
    for step in bar:
        clock = {"sample": 0.0, "teacher": 0.0, "student": 0.0}
        begin = tick(device)
        prefix_len = planned_prefix(step, config, growth["prefix_len"])
        generator = torch.Generator().manual_seed(config.seed + 104729 * (step + 1))
        rollout, wrote = respond(batch_of(rows, step, config), step, prefix_len, config, sampler, teacher, tokenizer,
                                 stop_ids, vocab, generator, cache, room)  # fmt: skip
        clock["sample"] = tick(device) - begin
        n = rollout.num_supervised()
        if not n:
            raise InputError(f"step {step + 1}: nothing to learn from, since every response ended within the "
                             f"--teacher_prefix of {config.teacher_prefix} tokens; {kept_state(step)}. A shorter "
                             "--teacher_prefix or a larger --batch_size would leave something")  # fmt: skip

        try:
            stats = train_on(rollout, student, scorer, config, vocab, stop_ids, autocast, clock, forwards)
            start = tick(device)
            grad_norm = float(torch.nn.utils.clip_grad_norm_(student.parameters(), config.grad_clip or math.inf))
            if not math.isfinite(grad_norm):
                broken = [k for k, p in student.named_parameters() if not torch.isfinite(p.grad).all()]
                raise FloatingPointError("the loss is finite, but not the gradient "
                                         + (f"of {broken[0]}, {len(broken)} in all" if broken else "norm"))  # fmt: skip
        except (FloatingPointError, RuntimeError) as error:  # the weights are still those of the step before
            raise run.failure_of(error, step + 1, functools.partial(kept_state, step), config) from None
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

        mean = {k: v.double().mean().item() for k, v in stats.items() if k != "position"}
        finish = rollout.finished.double().mean().item()
        log.write({
            "step": step + 1, "prefix_len": prefix_len, **mean,
            "kl_by_position": by_position(stats["kl"], stats["position"]) if "kl" in stats else {},
            "finish": finish, "capped": 1 - finish, "response_len": rollout.lens.double().mean().item(), "tokens": n,
            **books.account(rollout, wrote, student.config, scorer and scorer.config, config.iw_gamma > 0, clock,
                            seconds, rate, totals),
            "peak_memory": books.peak_memory(device), "lr": learning_rate(step, config), "grad_norm": grad_norm,
            "update_norm": books.update_norm(optimizer), **{f"total_{k}": v for k, v in totals.items()},
        })  # fmt: skip
        bar.set_postfix_str(f"loss {mean['loss']:.4f}, KL/token {mean.get('kl', math.nan):.4f}, prefix_len "
                            f"{prefix_len}, {n / seconds:,.0f} tok/s")  # fmt: skip
        first_kl = mean.get("kl", 0.0) if first_kl is None else first_kl
        if not warned and (warned := drift_warning(mean.get("kl", 0.0), first_kl, finish, config)):
            bar.write(warned)
        if config.schedule == "adaptive" and prefix_len == growth["prefix_len"]:
            reached = (rollout.lens >= prefix_len).double().mean().item()
            growth = adapted_prefix(growth, stats["kl"], stats["position"], reached, config)

        last = step + 1 == config.steps or bool(interrupted)
        if test and config.eval_every and (step + 1) % config.eval_every == 0 and not last:
            bar.write(f"step {step + 1}: {judge(sampler, 'student', step + 1)}")
        if last or (config.save_every and (step + 1) % config.save_every == 0):
            saved = save(step + 1)
        if last:
            break
    bar.close()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if first_step >= config.steps:
        print(f"the run in {config.out_dir} has its {config.steps} steps already")
        saved = resume_from
    if test and not interrupted and not any("eval" in r and r["step"] >= config.steps for r in log.records()):
        judge(sampler, "student", config.steps)
    log.close()
    run.summarize(log.path, saved, bool(interrupted))


if __name__ == "__main__":
    run_command(train, parse_flags(Config, __doc__))
