"""On-policy distillation from reasoning prefixes: the student writes, the teacher marks, the student learns.

    python train.py --prefix_len 1024               # distil the embedded pair on whatever machine this is
    python train.py --prefix_len 256                # the paper's point: the first tokens carry most of the lesson
    python train.py --plan --prefix_len 256         # what a run would take: memory, and FLOP by prefix length
    python train.py --student Qwen/Qwen3-1.7B-Base --teacher Qwen/Qwen3-8B --data my_prompts.jsonl --lr 1e-6

One step, as in arXiv 2602.15260:
    1. sample     the student answers a batch of prompts, and sampling stops after `prefix_len` tokens
    2. score      the frozen teacher reads the same tokens
    3. learn      AdamW on the reverse KL from student to teacher, over the full vocabulary, at the response's positions

Where the responses come from (--rollout student | teacher | data) and what is minimised (--loss) are two independent
flags, so the same loop is also supervised fine-tuning (--rollout data --loss cross_entropy), which trained the embedded
pairs, and everything in between.

Read from here down: the flags; how long the prefix is; the prompts; who writes the responses; the loop; what a step
costs, and --plan.
"""

import ctypes
import math
import re
import signal
import sys
import time
import zlib
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from data import HERE, InputError, embedded_model, load_jsonl, resolve, run_command
from data.flags import check_flags, flag, parse_flags
from data.ranks import add_up, full, gather, join, rank, world
from data.run import Run, Unbroken, claim, fingerprint, restore_flags
from eval import Pair, by_position, examine, load_pair, preflight
from loss import LOSSES, distill_loss
from model import checkpoint_folder, choose_device, count_flops, count_parameters, head_dim_of, load_config
from sample import Rollout, generate


@dataclass
class Config:
    student: str = flag("", "checkpoint folder or hub name of the model that learns; empty takes --data's own",
                        group="the pair and the data")
    teacher: str = flag("", "checkpoint folder or hub name of the frozen model that scores; empty takes --data's own")
    init: str = flag("pretrained", "pretrained, or random: --student's configuration with fresh weights from --seed",
                     choices=("pretrained", "random"))
    data: str = flag("search", "training prompts: a name (data/NAME/train.jsonl) or a .jsonl file")
    eval_data: str = flag("", "held-out problems, likewise; empty takes --data's own test split, if it has one")
    chat: str = flag("auto", "through the student's chat template where there is one; on: demand it; off: bare prompts")
    system: str = flag("", "text of a system turn before each prompt, for checkpoints with a chat template")
    thinking: str = flag("", "on or off, for chat templates that have the switch")
    stop_tokens: str = flag("", "further stop tokens besides those both checkpoints declare: names or ids, with commas")
    out_dir: str = flag("out", "where log.jsonl and the checkpoints go")

    prefix_len: int = flag(1024, "sampling stops after this many tokens; lower it first if memory or time runs out",
                           group="the method", least=1)
    schedule: str = flag("constant", "how the prefix grows from --prefix_start to --prefix_len: constant (not at all), "
                         "linear, staircase (in stairs of an 8th of --prefix_len), or adaptive (when its last "
                         "half has been learnt)",
                         choices=("constant", "linear", "staircase", "adaptive"))
    prefix_start: int = flag(0, "where a growing prefix starts; 0 takes a 16th of --prefix_len", least=0)
    window: str = flag("prefix", "what is supervised: the prefix, where sampling stops; or, as control experiments, "
                       "the first, last or random --prefix_len tokens of responses of --max_new_tokens",
                       choices=("prefix", "first", "last", "random"))
    rollout: str = flag("student", "who writes the responses: student (on-policy), teacher, or data (its `solution`)",
                        choices=("student", "teacher", "data"))
    mix: float = flag(0.0, "share of each batch's rows whose responses the teacher writes, whole (up to "
                      "--max_new_tokens), with --rollout student: keeps what lies beyond a short prefix in place",
                      least=0, most=1)
    loss: str = flag("reverse_kl", f"what is minimised: {', '.join(LOSSES)}", choices=LOSSES)
    beta: float = flag(0.5, "mixture of the jsd loss", above=0, below=1)
    top_k: int = flag(64, "tokens that the topk_reverse_kl loss tells apart; all others are one bucket", least=1)
    temperature: float = flag(1.0, "of sampling and of both models' distributions in the loss", above=0, below=math.inf)
    stop_class: bool = flag(True, "treat all stop tokens of both models as one outcome in losses with a teacher")

    steps: int = flag(20, "optimizer steps", group="optimisation", least=1)
    batch_size: int = flag(16, "prompts a step; lower it when memory runs out in sampling", least=1,
                           most=2**20)
    lr: float = flag(5e-4, "peak learning rate; real models want 1e-6 to 1e-5", above=0, below=math.inf)
    lr_schedule: str = flag("cosine", "constant, or cosine (towards zero at the last step), after the warm-up",
                            choices=("constant", "cosine"))
    warmup: int = flag(2, "steps of linear warm-up", least=0)

    eval_every: int = flag(0, "evaluate every this many steps, besides before and after; 0: only then; -1: only after",
                           group="evaluation", least=-1)
    eval_problems: int = flag(100, "held-out problems to answer; 0 measures no accuracy", least=0)
    eval_kl: int = flag(32, "held-out prompts to measure the reverse KL on, over whole responses; 0 is off",
                        least=0)
    eval_batch_size: int = flag(128, "problems answered at once; lower it when memory runs out in evaluation", least=1)
    max_new_tokens: int = flag(4096, "cap on responses in evaluation, with --window and with --mix", least=1)

    micro_tokens: int = flag(8192, "tokens that go forward and backward at once, padding included; the result is the "
                             "same; lower it when memory runs out in learning", group="the machine", least=1)
    recompute: bool = flag(False, "keep only the blocks' inputs for backward: much less memory, a third more FLOP")
    compile: bool = flag(False, "torch.compile the two forwards of learning; on CUDA, graphs of the decode steps")
    device: str = flag("", "cpu, cuda, cuda:1, ...; empty chooses")
    teacher_device: str = flag("", "another device for the teacher; empty takes --device")
    shard: int = flag(1, "split the student, its gradients and moments over this many ranks of torchrun", least=1)
    shard_teacher: bool = flag(False, "split the teacher over them too")
    dtype: str = flag("", "float32 or bfloat16 for forward passes (the student's weights stay float32); empty chooses",
                      choices=("", "float32", "bfloat16"))

    seed: int = flag(1337, "of the data order, the sampling and fresh weights", group="the run", least=0)
    save_every: int = flag(0, "checkpoint every this many steps, besides the last and at Ctrl-C; 0 is off; two stay",
                           least=0)
    resume: bool = flag(False, "continue the run in --out_dir from its last complete checkpoint")
    overwrite: bool = flag(False, "discard the run in --out_dir")
    plan: bool = flag(False, "only print what the run would take, from the two config.json alone")
    world: int = flag(1, "ranks that --plan counts with", least=1)


def complete(c: Config) -> None:
    """Refuse flags that contradict each other, and fill in those that follow from others."""
    check_flags(c)
    ranks = c.world if c.plan else world()
    needs_teacher = c.loss != "cross_entropy" or c.rollout == "teacher" or c.mix > 0
    c.student = c.student or embedded_model(c.data, "student", "student")
    c.teacher = c.teacher or (embedded_model(c.data, "teacher", "teacher") if needs_teacher else "")
    c.prefix_start = c.prefix_start or max(1, c.prefix_len // 16)
    clashes = (
        (c.loss == "sampled_kl" and (c.rollout != "student" or c.mix > 0),
         "--loss sampled_kl estimates from the student's own samples: use it with --rollout student and --mix 0"),
        (c.schedule != "constant" and c.prefix_start > c.prefix_len,
         f"--prefix_start {c.prefix_start} lies above --prefix_len {c.prefix_len}"),
        (c.schedule == "adaptive" and c.loss == "cross_entropy",
         "--schedule adaptive follows the KL to the teacher, which is not available with --loss cross_entropy"),
        (c.schedule == "adaptive" and c.window not in ("prefix", "first"),
         f"--schedule adaptive follows the end of the prefix: it needs --window prefix or first, found {c.window}"),
        (c.mix > 0 and c.rollout != "student", f"--mix is for --rollout student, found --rollout {c.rollout}"),
        (c.mix > 0 and c.window != "prefix", "--mix and --window exclude each other"),
        (0 < c.mix and round(c.mix * c.batch_size) == 0,
         f"--mix {c.mix} of --batch_size {c.batch_size} is less than one row: raise one of the two"),
        (c.batch_size < ranks, f"--batch_size {c.batch_size} is less than one row for each of {ranks} ranks"),
        (ranks % c.shard, f"--shard {c.shard} does not divide the number of ranks, {ranks}: " + (
            "give --world" if c.plan else "start a multiple of it with torchrun")),
        (c.shard_teacher and (c.shard == 1 or c.mix or c.rollout == "teacher" or c.teacher_device),
         "--shard_teacher needs --shard, and excludes --mix, --rollout teacher and --teacher_device"),
    )
    for clash, message in clashes:
        if clash:
            raise InputError(message)


# --- how long the prefix is


def prefix_len_at(step: int, config: Config, state: dict) -> int:
    """The prefix length of a step (counted from 0). state: the adaptive schedule's."""
    if config.schedule == "constant":
        return config.prefix_len
    if config.schedule == "adaptive":
        return state["prefix_len"]
    progress = min(1.0, step / max(1, config.steps - 1))
    grown = round(progress * (config.prefix_len - config.prefix_start))
    if config.schedule == "staircase" and progress < 1:
        stair = max(1, config.prefix_len // 8)
        grown = grown // stair * stair
    return config.prefix_start + grown


def grow(state: dict, kl: Tensor, position: Tensor, lens: Tensor, config: Config) -> dict:
    """The adaptive schedule: its next state, from a step's KL (n,) at the response positions (n,), and the lengths of
    its responses (B,).

    The prefix grows by half when the KL of its last half is down to a tenth of what it was in the run's first step, or,
    smoothed over steps, has not fallen by 5% below its lowest for three steps; but only if a quarter of the responses
    reach its end, since otherwise a longer prefix would add little. After adaptive FastOPD (arXiv 2607.29494), whose
    four signals this reduces to two.
    """
    length = state["prefix_len"]
    edge = kl[(position >= length // 2) & (position < length)]
    if not len(edge):
        return state
    now = edge.double().mean().item()
    if state["smooth"] is None:  # the first step at this length
        state = {"prefix_len": length, "smooth": now, "first": state.get("first", now), "lowest": now, "waited": -1}
    smooth = 0.7 * state["smooth"] + 0.3 * now
    fell = smooth < 0.95 * state["lowest"]
    waited, lowest = (0, smooth) if fell else (state["waited"] + 1, state["lowest"])
    reached = (lens >= length).double().mean() >= 0.25
    if (waited >= 3 or now < 0.1 * state["first"]) and reached and length < config.prefix_len:
        return {**state, "prefix_len": min(config.prefix_len, math.ceil(1.5 * length)), "smooth": None}
    return {**state, "smooth": smooth, "lowest": lowest, "waited": waited}


def longest_response(config: Config) -> int:
    """Tokens of the longest response that a step may see."""
    if config.window != "prefix":
        return config.max_new_tokens
    return max(config.prefix_len, config.max_new_tokens if config.mix else 0)


# --- the prompts


def read_prompts(config: Config) -> tuple[list[dict], list[dict]]:
    """(rows to train on, held-out rows)."""
    need = ("prompt", "solution") if config.rollout == "data" else ("prompt",)
    rows = load_jsonl(resolve(config.data, "train"), need)
    own = (HERE / config.data / "test.jsonl").is_file()
    if not (config.eval_problems or config.eval_kl):
        return rows, []
    if not (config.eval_data or own):
        if config.eval_every > 0:
            raise InputError(f"--eval_every {config.eval_every}: --data {config.data} has no held-out problems; give "
                             "some with --eval_data")
        print("no held-out problems (--eval_data): only the training loss will be known")
        return rows, []
    file = resolve(config.eval_data or config.data, "test", "eval_data" if config.eval_data else "data")
    try:
        return rows, load_jsonl(file, ("prompt", "answer") if config.eval_problems else ("prompt",))
    except InputError as error:
        mend = "; --eval_problems 0 measures only the KL, which needs none" if '"answer"' in str(error) else ""
        raise InputError(f"{error}{mend}") from None


def encode_prompts(config: Config, rows: list[dict], pair: Pair) -> None:
    """Add `prompt_ids` (and `solution_ids`) to the rows. The longest must fit both models."""
    for row in tqdm(rows, desc="tokenize", leave=False, delay=2):
        row["prompt_ids"] = pair.tokenizer.encode_prompt(row["prompt"])
        if config.rollout == "data":
            row["solution_ids"] = pair.tokenizer.encode(row["solution"])
        if not row["prompt_ids"]:
            raise InputError(f"--data {config.data}: a prompt is empty, and this tokenizer puts nothing before it")
    cap, longest = longest_response(config), max(len(row["prompt_ids"]) for row in rows)
    cap = max(cap, config.max_new_tokens if config.eval_problems or config.eval_kl else 0)
    flag_name = "prefix_len" if cap == config.prefix_len else "max_new_tokens"
    for model in filter(None, (pair.student, pair.teacher)):
        if longest + cap > model.config.max_position_embeddings:
            raise InputError(
                f"--{flag_name} {cap} and the longest prompt of --data, {longest} tokens, exceed the "
                f"{model.config.max_position_embeddings} positions of the model: lower the one or shorten the other"
            )


# --- who writes the responses


def batch_of(rows: list[dict], step: int, config: Config) -> list[dict]:
    """The rows of a step: a fresh permutation every epoch, a function of (seed, step) alone, so resuming needs no
    state."""
    wanted = range(step * config.batch_size, (step + 1) * config.batch_size)
    batch = []
    for epoch in range(wanted.start // len(rows), (wanted.stop - 1) // len(rows) + 1):
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(config.seed + 7919 * epoch)).tolist()
        batch += [rows[order[i % len(rows)]] for i in wanted if i // len(rows) == epoch]
    return batch


def respond(batch: list[dict], step: int, prefix_len: int, config: Config, pair: Pair) -> Rollout:
    """A response to every prompt of the batch.

    The first rows are the teacher's (--mix) or all of them are (--rollout teacher), or all are the data's solutions;
    the student writes the others. Of whole responses, a --window picks the tokens to supervise. Of several ranks, each
    takes its rows; what is random is drawn for the whole batch, so that it does not depend on their number.
    """
    generator = torch.Generator().manual_seed(config.seed + 104729 * (step + 1))
    seeds = torch.randint(2**63 - 1, (len(batch),), generator=generator).tolist()
    where = torch.rand(len(batch), generator=generator, dtype=torch.float64)[rank() :: world()]
    mine = range(rank(), len(batch), world())
    prompts, responses, flop = [batch[i]["prompt_ids"] for i in mine], [], 0.0
    cap = prefix_len if config.window == "prefix" else config.max_new_tokens
    by_teacher = len(batch) if config.rollout == "teacher" else round(config.mix * len(batch))
    if config.rollout == "data":
        responses = [[*batch[i]["solution_ids"], pair.tokenizer.eos_id][:cap] for i in mine]
    else:
        whole = config.max_new_tokens if config.mix else cap
        for writer, rows, most in ((pair.teacher, [i for i in mine if i < by_teacher], whole),
                                   (pair.decoder, [i for i in mine if i >= by_teacher], cap)):
            if rows:
                part = generate(writer, [batch[i]["prompt_ids"] for i in rows], most, pair.stop_ids, config.temperature,
                                seeds=[seeds[i] for i in rows])
                responses += [part.response(i) for i in range(len(rows))]
                flop += part.flop
    rollout = Rollout.of(prompts, responses, pair.stop_ids)
    rollout.flop = flop
    if config.window != "prefix":
        rest = (rollout.lens - prefix_len).clamp(min=0)  # tokens outside the window
        start = {"first": rest * 0, "last": rest, "random": (where * (rest + 1)).long()}[config.window]
        rollout.supervised = torch.stack((start, (start + prefix_len).minimum(rollout.lens)), dim=1)
    return rollout


# --- the loop


def even_micro_batches(rollout: Rollout, micro_tokens: int) -> tuple[list[tuple[Tensor, Tensor, Tensor]], int]:
    """This rank's micro-batches, and the supervised tokens of all ranks. A rank with fewer micro-batches than others
    gets some that supervise nothing, since with --shard all wait for each other in every forward."""
    mine = list(rollout.micro_batches(micro_tokens))
    counts = gather((len(mine), rollout.num_supervised()))
    nothing = torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, 1, dtype=torch.bool), torch.zeros(0, dtype=torch.long)
    return mine + [nothing] * (max(c[0] for c in counts) - len(mine)), sum(c[1] for c in counts)


def learning_rate(step: int, config: Config) -> float:
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.lr_schedule == "constant":
        return config.lr
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * 0.5 * (1 + math.cos(math.pi * progress))


def due(step: int, config: Config) -> bool:
    """Whether an evaluation is due during a run; the one at its end comes in any case."""
    return config.eval_every > 0 and step % config.eval_every == 0 and step < config.steps


def train(config: Config) -> None:
    join()
    resume_from = restore_flags(config) if config.resume else None
    complete(config)
    if config.plan:
        plan(config)
        return
    try:
        with claim(config):  # no other run may write to --out_dir meanwhile
            distill(config, resume_from)
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def distill(config: Config, resume_from: Path | None) -> None:
    """The run: what it needs, then its steps."""
    keep_freed_memory()
    rows, test = read_prompts(config)  # before the models, which may have to be downloaded
    pair = load_pair(config, resume_from)
    encode_prompts(config, rows, pair)
    student, teacher, device, half = pair.student, pair.teacher, pair.device, pair.dtype.itemsize < 4
    scored = config.loss != "cross_entropy"  # which needs no teacher
    there = teacher.device if scored else device
    head_copy = None if there == device else teacher.head.to(device)  # where the loss is computed
    read_s, read_t = student, teacher
    if config.compile:
        read_s, read_t = (model and torch.compile(model, dynamic=True) for model in (student, teacher))
        pair.decoder.graphs = {} if device.type == "cuda" else None
    optimizer = torch.optim.AdamW(student.parameters(), lr=config.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    loss_options = {
        "loss": config.loss, "temperature": config.temperature, "beta": config.beta, "top_k": config.top_k,
        "vocab": pair.vocab, "stop_ids": pair.stop_ids if config.stop_class and scored else (),
    }
    inputs = {"file of --data": zlib.crc32(resolve(config.data, "train").read_bytes())}
    if teacher is not None:
        inputs["teacher's weights"] = fingerprint(checkpoint_folder(config.teacher))
    run = Run(config, pair, optimizer, resume_from, inputs)
    print(f"{len(rows):,} prompts, {len(test):,} held-out; {device}" + f", {world()} ranks" * (world() > 1))
    if teacher is not None and resume_from is None:
        prompts = [row["prompt"] for row in batch_of(rows, 0, config)[:16]]
        print("\n".join(preflight(pair, prompts, config)))
    # Before the first step, or in a resumed run what an interruption left out. Random weights have nothing to measure.
    wanted = due(run.step, config) if run.step else config.init == "pretrained" and config.eval_every >= 0
    if test and wanted and not run.evaluated():
        with together("evaluation", run, config):
            examine(pair, test, config, run)

    for name in (signal.SIGINT, signal.SIGTERM) if world() == 1 else (signal.SIGINT,):
        signal.signal(name, run.interrupt)  # ends the run after this step
    bar = tqdm(range(run.step, config.steps), initial=run.step, total=config.steps, desc="train", disable=rank() > 0)
    for step in bar:
        peak_memory(device)  # forgets what an evaluation took
        start, prefix_len, parts = now(device), prefix_len_at(step, config, run.adaptive), []

        # 1. sample: responses to this rank's prompts of the batch; sampling stops after prefix_len tokens
        with together("sampling", run, config):
            rollout = respond(batch_of(rows, step, config), step, prefix_len, config, pair)
        micro_batches, n = even_micro_batches(rollout, config.micro_tokens)
        sampled = now(device)

        with together("learning", run, config):
            for tokens, mask, position in micro_batches:
                # Indices of the supervised positions among all b * (T-1), and the tokens that follow there. A GPU would
                # stop at a mask, to be told how many are set.
                at, targets = mask.flatten().nonzero()[:, 0].to(device), tokens[:, 1:][mask].to(device)  # (n,) each
                tokens = tokens[:, :-1].to(device)  # (b, T-1)

                # 2. score: the teacher reads the same tokens
                hidden_t = head_t = None
                if scored:
                    hidden_t = read_t(tokens.to(there)).flatten(0, 1)[at.to(there)].to(device)  # (n, H_t)
                    head_t = teacher.head if head_copy is None else head_copy

                # 3. learn: a token weighs 1 / (supervised tokens of the step), however the step is split
                with torch.autocast(device.type, dtype=pair.dtype, enabled=half and config.shard == 1):
                    hidden_s = read_s(tokens).flatten(0, 1)[at].to(pair.dtype)  # (n, H_s)
                weights = torch.full((len(at),), 1 / n, device=device)
                loss, row_stats = distill_loss(
                    hidden_s, student.head, hidden_t, head_t, token_weights=weights, targets=targets, **loss_options,
                )
                loss.backward()
                parts.append(row_stats | {"position": position})
            stats = {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}
            must_be_finite(stats)
        if config.shard == 1:  # else backward has done it
            add_up([p.grad for p in student.parameters()])
        with together("the optimizer's step", run, config):
            grad_norm = float(full(torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)))
            if not math.isfinite(grad_norm):
                raise FloatingPointError("the loss is finite, but the gradient is not")
            optimizer.param_groups[0]["lr"] = learning_rate(step, config)
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        pair.decoder.refresh(student)

        # log, save, evaluate
        run.step += 1
        seconds = {"seconds_sample": sampled - start, "seconds_learn": now(device) - sampled}
        stats, lens, record = record_of(run, pair, rollout, stats, seconds)
        run.write(record | {"prefix_len": prefix_len, "lr": learning_rate(step, config), "grad_norm": grad_norm,
                            "peak_memory": peak_memory(device)})
        bar.set_postfix_str(f"loss {record['loss']:.4f}, prefix_len {prefix_len}, finished {record['finish']:.0%}, "
                            f"{record['tokens_per_s']:,.0f} tok/s")
        if config.schedule == "adaptive":
            run.adaptive = grow(run.adaptive, stats["kl"], stats["position"], lens, config)
        if run.interrupted or run.step == config.steps or (config.save_every and run.step % config.save_every == 0):
            run.save()
        if test and due(run.step, config) and not run.interrupted:
            with together("evaluation", run, config):
                examine(pair, test, config, run)
        if run.interrupted:
            break
    bar.close()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if test and not run.interrupted and not run.evaluated():
        with together("evaluation", run, config):
            examine(pair, test, config, run)
    run.summarize(whole_flops(run, pair, rows, config) if test else None)


def record_of(run: Run, pair: Pair, rollout: Rollout, stats: dict, seconds: dict) -> tuple[dict, Tensor, dict]:
    """Gathers a step from all ranks: its statistics by token, the lengths of its responses, and its record in log.jsonl
    (data/readme.md explains the fields). Brings the run's totals up to date, and an interrupt to every rank."""
    teacher = pair.teacher.config if run.config.loss != "cross_entropy" else None
    flops = {"flop_sample": rollout.flop, **learning_flops(rollout, pair.student.config, teacher)}
    ranks = gather({"stats": stats, "lens": rollout.lens, "finished": rollout.finished, "flops": flops,
                    "interrupted": run.interrupted})
    run.interrupted = any(r["interrupted"] for r in ranks)
    stats = {name: torch.cat([r["stats"][name] for r in ranks]) for name in ranks[0]["stats"]}
    lens, finished = (torch.cat([r[name] for r in ranks]) for name in ("lens", "finished"))
    flops = {name: sum(r["flops"][name] for r in ranks) for name in ranks[0]["flops"]}
    n, took, flop = len(stats["position"]), sum(seconds.values()), sum(flops.values())
    sampled = 0 if run.config.rollout == "data" else int(lens.sum())
    for name, value in zip(run.totals, (sampled, n, flop, took)):
        run.totals[name] += value
    return stats, lens, {
        "step": run.step, **{name: x.double().mean().item() for name, x in stats.items() if name != "position"},
        "kl_by_position": by_position(stats["kl"], stats["position"]) if "kl" in stats else {},
        "finish": finished.double().mean().item(), "response_len": lens.double().mean().item(),
        "tokens": n, **flops, **seconds, "tokens_per_s": n / took, "flop_per_s": flop / took,
        **{f"total_{name}": x for name, x in run.totals.items()},
    }


def peak_memory(device: torch.device) -> int:
    """Bytes: of the device on CUDA, since the last call; on Linux of the whole process; else 0."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    status = Path("/proc/self/status")
    return int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) * 1024 if status.exists() else 0


def now(device: torch.device) -> float:
    """Seconds, after all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def keep_freed_memory() -> None:
    """Have the C library keep freed memory for the next step: asking Linux for it again takes longer than using it."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):  # glibc, not musl
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD


def must_be_finite(stats: dict[str, Tensor]) -> None:
    """Raise FloatingPointError where a token's loss is not finite, naming places and cause."""
    wrong = ~stats["loss"].isfinite()
    if bool(wrong.any()):
        broken = [who for who in ("teacher", "student")
                  if f"{who}_logprob" in stats and not stats[f"{who}_logprob"].isfinite().all()]
        raise FloatingPointError(f"the loss is not finite at response positions {stats['position'][wrong].tolist()[:5]}"
                                 + (f", nor is what the {' and the '.join(broken)} says there" if broken else ""))


@contextmanager
def together(stage: str, run: Run, config: Config):
    """What runs out of memory or becomes infinite on one rank in here ends all of them, with one message that names the
    flag to change, after saving the run as it was after its last whole step. Other errors end their rank, and torchrun
    the rest."""
    failure, out_of_memory = None, False
    try:
        yield
    except (FloatingPointError, RuntimeError) as error:
        out_of_memory = isinstance(error, torch.OutOfMemoryError) or any(
            words in str(error) for words in ("out of memory", "DefaultCPUAllocator", "ALLOC_FAILED")
        )
        if not out_of_memory and not isinstance(error, FloatingPointError):
            raise
        failure = (out_of_memory, f"out of memory in {stage}" if out_of_memory else str(error))
    # Where a sharded model ran out of memory, the other ranks wait inside its forward: they cannot be told.
    alone = out_of_memory and config.shard > 1 and stage == "learning"
    failure = failure if alone else next(filter(None, gather(failure)), None)
    if failure is None:
        return
    out_of_memory, what = failure
    if run.step and not alone and not (out_of_memory and stage == "the optimizer's step"):
        run.save()
    again = "Start again (--overwrite)" if run.saved is None else "Start another run from there (--student)"
    mend = "with a lower --eval_batch_size" if stage == "evaluation" else "with a lower --batch_size or --prefix_len"
    if not out_of_memory:
        mend = "with a lower --lr, or with --dtype float32"
    elif stage not in ("sampling", "evaluation"):
        again = again if run.saved is None else "Go on (--resume)"
        mend = f"with a lower --micro_tokens (it was {config.micro_tokens}), or with --recompute"
    kept = f"the last state saved is {run.saved}" if run.saved else "nothing was saved"
    step = run.step + (stage != "evaluation")
    raise InputError(f"step {step}: {what}; {kept}. {again} {mend}")


# --- what a step costs


def learning_flops(rollout: Rollout, student, teacher) -> dict[str, float]:
    """Matmul FLOP of one step's scoring and learning, of the tokens really processed, padding not counted. student and
    teacher (None where it does not score) are configurations. What --recompute computes twice is counted once."""
    read = rollout.prompt_lens.double() + rollout.supervised[:, 1] - 1  # the last supervised token is only predicted
    tokens, pairs, heads = read.sum().item(), (read * (read + 1) / 2).sum().item(), rollout.num_supervised()
    return {"flop_teacher": count_flops(teacher, tokens, pairs, heads) if teacher is not None else 0.0,
            "flop_student": 3 * count_flops(student, tokens, pairs, heads)}


def row_flops(writer: str, scored: bool, student, teacher, prompt: float, length: float, rms: float = 0) -> list[float]:
    """FLOP of sampling, scoring and learning from one response of `length` tokens that the writer ("student", "teacher"
    or "data") wrote; rms: its root mean square, where `length` is a mean."""
    fed = prompt - 1 + length
    square = (prompt - 1) ** 2 + 2 * (prompt - 1) * length + (rms or length) ** 2
    once = {name: count_flops(model, fed, (square + fed) / 2, length) if model is not None else 0.0
            for name, model in (("student", student), ("teacher", teacher))}
    return [once.get(writer, 0.0), once["teacher"] * scored, 3 * once["student"]]


def whole_flops(run: Run, pair: Pair, rows: list[dict], config: Config) -> float | None:
    """What the run's steps would have cost on whole responses, by the lengths seen in its evaluations."""
    seen = [r for r in run.records() if r.get("eval") == "student" and r["kind"] == "sampled"]
    if not seen or pair.teacher is None or config.rollout != "student" or config.window != "prefix":
        return None
    prompt = sum(len(row["prompt_ids"]) for row in rows) / len(rows)
    models = pair.student.config, pair.teacher.config
    per_row = [sum(row_flops("student", config.loss != "cross_entropy", *models, prompt, r["mean_len"], r["rms_len"]))
               for r in seen]
    return run.step * config.batch_size * sum(per_row) / len(per_row)


def plan(config: Config) -> dict[str, float]:
    """Print parameters, memory by part and FLOP by prefix length, from the two configurations alone. Returns bytes a
    device "while sampling" and "while learning".

    Assumed: prompts of 64 tokens, whole responses of --max_new_tokens, the longest response in every row; for the FLOP
    that --window is prefix and --schedule constant. Not counted: evaluation, whose cache grows with --eval_batch_size
    x --max_new_tokens, and what Python, torch and the prompts take.
    """
    prompt, whole, length = 64, config.max_new_tokens, longest_response(config)
    on_gpu = (config.device or choose_device("").type).startswith("cuda")  # which need not be here
    size = 2 if (config.dtype or ("bfloat16" if on_gpu else "float32")) == "bfloat16" else 4
    s, t = (load_config(checkpoint_folder(name, ("config.json",))) if name else None
            for name in (config.student, config.teacher))
    P, P_t = count_parameters(s), count_parameters(t) if t is not None else 0
    V, H, D, parts = s.vocab_size, s.hidden_size, head_dim_of(s), config.shard
    rows = math.ceil(config.batch_size / config.world)
    packed = 1 if on_gpu or size == 2 else 2  # a CPU's Decoder holds its matrices twice
    # What autograd keeps of a token in a block: inputs of norms in float32, inputs of products in `size` bytes.
    heads = s.num_attention_heads * D + s.num_key_value_heads * D
    norms = 4 * H + (2 * heads if s.model_type == "qwen3" else 0)
    block = 4 * norms + size * (2 * H + 2 * heads + 4 * s.intermediate_size)
    tokens, layers = max(config.micro_tokens, prompt + length), s.num_hidden_layers
    activations = tokens * (4 * H * layers + block if config.recompute else block * layers)
    chunk = min(256, tokens) * V * 4 * (9 if on_gpu else 2.5)
    writers = [t] if config.rollout == "teacher" else [s, t] if config.mix else [s]
    kv = sum(2 * w.num_hidden_layers * w.num_key_value_heads * head_dim_of(w) for w in writers)
    gathered = size * (V * H * (1 if s.tie_word_embeddings else 2) + (P - V * H) // layers * 2) * (parts > 1)
    head_t = size * t.vocab_size * t.hidden_size if t is not None else 0
    always = {"student: float32 weights": 4 * P / parts, "student: AdamW's moments": 8 * P / parts,
              "student: copy that samples": packed * size * P,
              "teacher": packed * size * P_t / (parts if config.shard_teacher else 1),
              "KV cache": kv * (prompt + length) * min(rows, 256) * size * (config.rollout != "data")}
    sampling = {"logits of the new tokens": min(rows, 256) * V * 24}
    learning = {"gradients": 4 * P / parts, "gradient of the head, on its way": 4 * V * H, "logits of a chunk": chunk,
                "activations kept for backward": activations,
                "activations passing through": tokens * size * (4 * H + 3 * s.intermediate_size),
                "weights gathered by --shard": gathered + 2 * head_t * config.shard_teacher}
    if config.teacher_device:  # the teacher lies there, and a copy of its head here
        always["teacher"] = head_t
    teacher = f"; teacher {config.teacher}: {P_t:,}" if P_t else ""
    print(f"student {config.student}: {P:,} parameters{teacher}"
          f"\nassumed: prompts of {prompt} tokens, whole responses of {whole}, {rows} of {config.batch_size} rows on a "
          f"device, micro-batches of {config.micro_tokens} tokens, {size} bytes a number in forward passes\n\n"
          "memory of a device, GB")
    for part, b in (always | sampling | learning).items():
        print(f"  {part:40}{b / 1e9:10.3f}")
    found = {name: sum(always.values()) + sum(more.values())
             for name, more in (("while sampling", sampling), ("while learning", learning))}
    for name, b in found.items():
        print(f"  {'in all, ' + name:40}{b / 1e9:10.3f}")
    scored, mix = config.loss != "cross_entropy", config.mix
    by_teacher = row_flops("teacher", scored, s, t, prompt, whole)  # what --mix adds
    uncut = sum(row_flops(config.rollout, scored, s, t, prompt, whole))
    print("\nTFLOP a step whose responses are cut at prefix_len\n  prefix_len     sampling      teacher      student"
          "          all  saving")
    for cut in sorted({min(config.prefix_len, whole), whole, *(whole >> k for k in range(1, 8) if whole >> k)}):
        parts = row_flops(config.rollout, scored, s, t, prompt, cut)
        parts = [(1 - mix) * part + mix * other for part, other in zip(parts, by_teacher)]
        shown = (f"{config.batch_size * x / 1e12:12.4g}" for x in (*parts, sum(parts)))
        print(f"  {cut:10,} {' '.join(shown)}  {uncut / sum(parts):5.1f}x")
    return found


if __name__ == "__main__":
    sys.stdout, sys.stderr = Unbroken(sys.stdout), Unbroken(sys.stderr)
    run_command(train, parse_flags(Config, __doc__))
