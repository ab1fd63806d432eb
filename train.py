"""On-policy distillation from reasoning prefixes: the student writes, the teacher marks, the student learns.

    python train.py --prefix_len 1024               # distil the embedded pair on whatever machine this is
    python train.py --prefix_len 64                 # the paper's point: the first tokens carry most of the lesson
    python train.py --plan --prefix_len 64          # what a run would take: memory, and FLOP by prefix length
    python train.py --student Qwen/Qwen3-1.7B-Base --teacher Qwen/Qwen3-8B --data my_prompts.jsonl --lr 1e-6

One step, as in arXiv 2602.15260:
    1. sample     the student answers a batch of prompts, and sampling stops after `prefix_len` tokens
    2. score      the frozen teacher reads the same tokens
    3. learn      AdamW on the reverse KL from student to teacher, over the full vocabulary, at the response's positions

Where the responses come from (--rollout student | teacher | data) and what is minimised (--loss) are two independent
flags, so the same loop is also supervised fine-tuning (--rollout data --loss cross_entropy), which trained the embedded
pairs, and everything in between.

Read from here down: the flags; the prompts and the pair; how long the prefix is; who writes the responses; the loop;
what a step costs, and --plan.
"""

import copy
import math
import signal
import time
import zlib
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from data import HERE, InputError, embedded_model, load_jsonl, out_of_memory, resolve, run_command
from data.checkpoint import checkpoint_folder, head_dim_of, load_config
from data.flags import check_flags, flag, parse_flags
from data.ranks import all_gather, all_reduce, full_tensor, join, leave, rank, world_size
from data.run import Run, claim, fingerprint, restore_flags
from data.tokenizer import Clock, check_rendering
from eval import Pair, by_position, encode_prompts, evaluate, load_tokenizers, preflight, score, teacher_template
from loss import CHUNK_ROWS, LOSSES, distill_loss
from model import Transformer, choose_device, count_flops, count_parameters, default_dtype, load_teacher, shard
from sample import MAX_SLOTS, Rollout, fit_cap, generate, shorten

# Signals that end the run after its step: Ctrl-C, kill, and a terminal that closes (unless nohup ignores that).
ENDING = [signal.SIGINT, signal.SIGTERM]
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # not on Windows
    ENDING.append(signal.SIGHUP)


@dataclass
class Config:
    typed = ()  # names of the flags that were typed; parse_flags sets it

    student: str = flag("", "checkpoint folder or hub name of the model that learns; empty takes --data's own",
                        group="the pair and the data")
    teacher: str = flag("", "checkpoint folder or hub name of the frozen model that scores; empty takes --data's own")
    teacher_prompt: str = flag("", "what the teacher reads before a response, with {fields} of the row: $'{prompt}\\n"
                               "Solved: {solution}'; empty: the first row's `teacher_prompt`, or what both read")
    init: str = flag("pretrained", "pretrained, or random: --student's configuration with fresh weights from --seed",
                     choices=("pretrained", "random"))
    data: str = flag("hops", "training prompts: a name (data/NAME/train.jsonl) or a .jsonl file")
    eval_data: str = flag("", "held-out problems, likewise; empty takes --data's own test split, if it has one")
    chat: str = flag("auto", "through the student's chat template where there is one; on: demand it; off: bare prompts")
    system: str = flag("", "text of a system turn before each prompt, for checkpoints with a chat template")
    thinking: str = flag("", "on or off, for chat templates that have the switch", choices=("", "on", "off"))
    stop_tokens: str = flag("", "further stop tokens besides those both checkpoints declare: names or ids, with commas")
    out_dir: str = flag("out", "where log.jsonl and the checkpoints go")

    prefix_len: int = flag(1024, "sampling stops after this many tokens; lower it first if memory or time runs out",
                           group="the method", least=1)
    schedule: str = flag("constant", "how the prefix grows from --prefix_start to --prefix_len: constant (not at all), "
                         "linear, or adaptive (when its last half has been learnt)",
                         choices=("constant", "linear", "adaptive"))
    prefix_start: int = flag(0, "where a growing prefix starts; 0 takes a 16th of --prefix_len", least=0)
    window: str = flag("prefix", "what is supervised: the prefix, where sampling stops; or, as control experiments, "
                       "the first, last or random --prefix_len tokens of responses of --max_new_tokens",
                       choices=("prefix", "first", "last", "random"))
    rollout: str = flag("student", "who writes the responses: student (on-policy), teacher, or data (its `solution`)",
                        choices=("student", "teacher", "data"))
    mix: float = flag(0.0, "share of each batch's rows whose responses the teacher writes, whole (up to "
                      "--max_new_tokens), with --rollout student: so that what follows a short prefix is not unlearnt",
                      least=0, most=1)
    loss: str = flag("reverse_kl", f"what is minimised: {', '.join(LOSSES)}", choices=LOSSES)
    beta: float = flag(0.5, "mixture of the jsd loss", above=0, below=1)
    top_k: int = flag(64, "tokens that the topk_reverse_kl loss tells apart; all others are one bucket", least=1)
    temperature: float = flag(1.0, "of sampling and of both models' distributions in the loss", above=0, below=math.inf)
    stop_class: bool = flag(True, "treat all stop tokens of both models as one outcome in losses with a teacher")

    steps: int = flag(20, "optimizer steps", group="optimisation", least=1)
    batch_size: int = flag(16, "prompts per step; lower it when memory runs out in sampling", least=1,
                           most=2**20)
    lr: float = flag(5e-4, "peak learning rate; real models want 1e-6 to 1e-5", above=0, below=math.inf)
    lr_schedule: str = flag("cosine", "constant, or cosine (towards zero at the last step), after the warm-up",
                            choices=("constant", "cosine"))
    warmup: int = flag(2, "steps of linear warm-up", least=0)

    eval_every: int = flag(0, "evaluate every this many steps, besides before and after; 0: only then; -1: only after",
                           group="evaluation", least=-1)
    eval_problems: int = flag(100, "held-out problems to answer; 0: those of --eval_kl, which need no answer", least=0)
    eval_kl: int = flag(32, "whole responses to these problems to measure the reverse KL on; 0 is off", least=0)
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

    @property
    def scored(self) -> bool:
        """Whether the loss needs what a teacher says."""
        return self.loss != "cross_entropy"


def fill_in(c: Config) -> None:
    """Refuse flags that contradict each other, and fill in those that follow from others."""
    check_flags(c)
    ranks = c.world if c.plan else world_size()
    needs_teacher = c.scored or c.rollout == "teacher" or c.mix > 0
    c.student = c.student or embedded_model(c.data, "student", "student")
    c.teacher = c.teacher or (embedded_model(c.data, "teacher", "teacher") if needs_teacher else "")
    c.prefix_start = c.prefix_start or max(1, c.prefix_len // 16)
    clashes = (
        (c.loss == "sampled_kl" and (c.rollout != "student" or c.mix > 0),
         "--loss sampled_kl estimates from the student's own samples: use it with --rollout student and --mix 0"),
        (c.loss == "cross_entropy" and c.rollout == "student",
         "--loss cross_entropy imitates, and one's own text teaches nothing: --rollout data or teacher, without --mix"),
        (c.schedule == "constant" and "prefix_start" in c.typed,
         "--prefix_start is for a growing prefix: add --schedule linear or adaptive"),
        (c.schedule != "constant" and c.prefix_start > c.prefix_len,
         f"--prefix_start {c.prefix_start} lies above --prefix_len {c.prefix_len}"),
        (c.schedule == "adaptive" and not c.scored,
         "--schedule adaptive follows the KL to the teacher, which is not available with --loss cross_entropy"),
        (c.schedule == "adaptive" and c.window not in ("prefix", "first"),
         f"--schedule adaptive follows the end of the prefix: it needs --window prefix or first, found {c.window}"),
        (c.teacher_prompt and not c.teacher, "--teacher_prompt is for a run with a teacher"),
        (c.mix > 0 and c.rollout != "student", f"--mix is for --rollout student, found --rollout {c.rollout}"),
        (c.mix > 0 and c.schedule == "adaptive" and not c.resume,  # runs from before this was refused may go on
         "--schedule adaptive follows the student's rows alone: it excludes --mix"),
        (c.mix > 0 and c.window != "prefix", "--mix and --window exclude each other"),
        (0 < c.mix and round(c.mix * c.batch_size) == 0,
         f"--mix {c.mix} of --batch_size {c.batch_size} is less than one row: raise one of the two"),
        (c.batch_size < ranks, f"--batch_size {c.batch_size} is less than one row for each of {ranks} ranks"),
        (ranks % c.shard, f"--shard {c.shard} does not divide the number of ranks, {ranks}: " + (
            "give --world" if c.plan else "start a multiple of it with torchrun")),
        (c.shard_teacher and (c.shard == 1 or not c.teacher or c.mix or c.rollout == "teacher" or c.teacher_device),
         "--shard_teacher needs --shard and a teacher, and excludes --mix, --rollout teacher and --teacher_device"),
    )
    for clash, message in clashes:
        if clash:
            raise InputError(message)


# --- the prompts and the pair


def read_prompts(config: Config) -> tuple[list[dict], list[dict]]:
    """(rows to train on, held-out rows: the first --eval_problems, or --eval_kl if no answers are wanted)"""
    need = ("prompt", "solution") if config.rollout == "data" else ("prompt",)
    rows = load_jsonl(resolve(config.data, "train"), need)
    wanted = config.eval_problems or config.eval_kl
    if wanted and not config.eval_data and not (HERE / config.data / "test.jsonl").is_file():
        if config.eval_every > 0:
            raise InputError(f"--eval_every {config.eval_every}: --data {config.data} has no held-out problems; give "
                             "some with --eval_data")
        print("no held-out problems (--eval_data): only the training loss will be known")
        wanted = 0
    if not wanted:
        return rows, []
    file = resolve(config.eval_data or config.data, "test", "eval_data" if config.eval_data else "data")
    return rows, load_jsonl(file, ("prompt", "answer") if config.eval_problems else ("prompt",))[:wanted]


def load_pair(config: Config, resume_from: Path | None) -> Pair:
    device = choose_device(config.device)
    config.dtype = config.dtype or str(default_dtype(device)).removeprefix("torch.")
    files = ("*.json", "*.jinja") if config.init == "random" else ("*.json", "*.safetensors", "*.jinja")
    dtype, folder = getattr(torch, config.dtype), checkpoint_folder(config.student, files)
    if config.teacher:  # of another family it only scores; said before weights are downloaded or a run is discarded
        scores = not (config.mix or config.rollout == "teacher" or config.shard_teacher)
        load_config(checkpoint_folder(config.teacher, ("config.json",)), any_family=scores)
    tokenizer, teachers, vocab, stop_ids = load_tokenizers(
        folder, config.teacher, chat=config.chat, system=config.system, thinking=config.thinking,
        stop_tokens=config.stop_tokens)
    teacher = None
    if config.teacher:
        there = choose_device(config.teacher_device) if config.teacher_device else device
        teacher = load_teacher(config.teacher, there, vocab, dtype)
        teacher = shard(teacher, config.shard, dtype) if config.shard_teacher else teacher
    if resume_from is None and config.init == "random":
        student = Transformer(load_config(folder)).initialize(config.seed).to(device)
    else:
        student = Transformer.from_pretrained(resume_from or folder, device, torch.float32)
    student.recompute, student.vocab = config.recompute, vocab
    print(f"student {config.student}: {count_parameters(student.config):,} parameters, float32"
          + (f"; teacher {config.teacher}: {count_parameters(teacher.config):,}, {config.dtype}" if teacher else ""))
    # A copy samples if `dtype` is not float32, and with --shard, where a forward alone would leave old weights gathered
    # (model.py, `shard`). `copy_from` updates it in place, since CUDA graphs have recorded its addresses.
    sampler = student
    if dtype != torch.float32 or config.shard > 1:
        sampler = copy.deepcopy(student).to(dtype).requires_grad_(False)
        student = shard(student, config.shard, dtype) if config.shard > 1 else student
    if config.compile:  # the two forwards of learning; sampling has graphs of its own decode steps
        student.compile(dynamic=True)
        if teacher:
            teacher.compile(dynamic=True)
        sampler.graphs = {} if device.type == "cuda" else None
    merged = stop_ids if config.stop_class else ()
    print(f"vocabulary {vocab:,} of {student.config.vocab_size:,} rows; stop tokens "
          + ", ".join(f"{i} {tokenizer.decode([i])!r}" for i in stop_ids) + " (one class)" * (len(merged) > 1))
    return Pair(student, sampler, teacher, tokenizer, teachers, vocab, stop_ids, merged, dtype)


def prepare_prompts(config: Config, rows: list[dict], test: list[dict], pair: Pair) -> None:
    """Add the ids of prompts (and solutions) to the rows; both models must have room for what will be written."""
    template = teacher_template(config, rows) if pair.teacher is not None else ""
    encode_prompts(rows, pair.tokenizer, pair.vocab, "--data", template, pair.teacher_tokenizer)
    template = template if config.eval_kl else ""  # else the teacher reads no held-out problem
    where = "--eval_data" if config.eval_data else "--data"
    encode_prompts(test, pair.tokenizer, pair.vocab, where, template, pair.teacher_tokenizer)
    for tokenizer in filter(None, (pair.tokenizer, pair.teacher_tokenizer)):
        check_rendering(tokenizer, [row["prompt"] for row in rows[:8]])
    if config.rollout == "data":
        for number, row in enumerate(rows, start=1):
            row["solution_ids"] = [*pair.tokenizer.encode(row["solution"]), pair.tokenizer.eos_id]
            pair.tokenizer.check_ids(row["solution_ids"], pair.vocab, f"--data, row {number}, solution")
    caps = ["prefix_len"] * (config.window == "prefix")  # of responses in training
    caps += ["max_new_tokens"] * (config.window != "prefix" or config.mix > 0)
    for who, model, key in (("student", pair.student, "prompt_ids"), ("teacher", pair.teacher, "teacher_ids")):
        for kind, some, cap in (*(("", rows, cap) for cap in caps), ("held-out ", test, "max_new_tokens")):
            if model is not None and some:
                prompts, where = [row[key] for row in some], f"{kind}prompts of the {who}, "
                fit_cap(config, cap, prompts, model.config.max_position_embeddings, where)


# --- how long the prefix is


def prefix_len_at(step: int, config: Config, state: dict) -> int:
    """The prefix length of a step (counted from 0). state: the adaptive schedule's."""
    if config.schedule == "constant":
        return config.prefix_len
    if config.schedule == "adaptive":
        return state["prefix_len"]
    if config.schedule == "linear":
        progress = min(1.0, step / max(1, config.steps - 1))
        return config.prefix_start + round(progress * (config.prefix_len - config.prefix_start))
    raise NotImplementedError(f"--schedule {config.schedule} has no lines in prefix_len_at")


def grow(state: dict, kl: Tensor, position: Tensor, lens: Tensor, config: Config) -> dict:
    """The adaptive schedule: its next state, from a step's KL (n,) at the response positions (n,), and the lengths of
    its responses (B,).

    The prefix grows by half when the KL of its last half falls below a tenth of what that was in the run's first step,
    or when its running mean has not come down by 5% for three steps; but only if a quarter of the responses reach its
    end, since otherwise a longer prefix would add little. After adaptive FastOPD (arXiv 2607.29494), whose four signals
    this reduces to two.
    """
    length = state["prefix_len"]
    edge = kl[(position >= length // 2) & (position < length)]
    if not len(edge):
        return state
    edge_kl = edge.double().mean().item()
    first = state.get("first", edge_kl)
    if state["smooth"] is None:  # the first step at this length: -1, so that it does not count as waiting
        state = {"prefix_len": length, "smooth": edge_kl, "first": first, "lowest": edge_kl, "waited": -1}
    smooth = 0.7 * state["smooth"] + 0.3 * edge_kl
    fell = smooth < 0.95 * state["lowest"]
    waited, lowest = (0, smooth) if fell else (state["waited"] + 1, state["lowest"])
    reached = (lens >= length).double().mean() >= 0.25
    if (waited >= 3 or edge_kl < 0.1 * first) and reached and length < config.prefix_len:
        return {**state, "prefix_len": min(config.prefix_len, math.ceil(1.5 * length)), "smooth": None}
    return {**state, "smooth": smooth, "lowest": lowest, "waited": waited}


# --- who writes the responses


def batch_of(rows: list[dict], step: int, config: Config) -> list[dict]:
    """The rows of a step: shuffled anew every epoch by (seed, epoch) alone, so resuming needs no state. Primes space
    the generators' seeds, here and in `respond`, so that runs with --seed 1, 2, 3 share no orders or samples."""
    wanted = range(step * config.batch_size, (step + 1) * config.batch_size)
    batch = []
    for epoch in range(wanted.start // len(rows), (wanted.stop - 1) // len(rows) + 1):
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(config.seed + 7919 * epoch)).tolist()
        batch += [rows[order[i % len(rows)]] for i in wanted if i // len(rows) == epoch]
    return batch


def respond(batch: list[dict], step: int, prefix_len: int, config: Config, pair: Pair) -> Rollout:
    """A response to every prompt of the batch.

    The student writes them; with --mix the teacher writes the first rows, with --rollout teacher all. --rollout data
    takes the solutions, cut as responses are. A --window other than prefix supervises a part of whole responses. Each
    rank takes its rows; what is random is drawn for the whole batch, so that it does not depend on the ranks' number.
    """
    generator = torch.Generator().manual_seed(config.seed + 104729 * (step + 1))
    seeds = torch.randint(2**63 - 1, (len(batch),), generator=generator).tolist()
    window_draw = torch.rand(len(batch), generator=generator, dtype=torch.float64)[rank() :: world_size()]
    cap = prefix_len if config.window == "prefix" else config.max_new_tokens
    by_teacher = len(batch) if config.rollout == "teacher" else round(config.mix * len(batch))
    mine, responses, flop = range(rank(), len(batch), world_size()), [], 0.0
    if config.rollout == "data":
        responses = [batch[i]["solution_ids"][:cap] for i in mine]
    else:
        teacher_cap = config.max_new_tokens if config.mix else cap
        for writer, key, limit, rows in (
            (pair.teacher, "teacher_ids", teacher_cap, [i for i in mine if i < by_teacher]),
            (pair.sampler, "prompt_ids", cap, [i for i in mine if i >= by_teacher]),
        ):
            if rows:
                part = generate(writer, [batch[i][key] for i in rows], limit, pair.stop_ids, config.temperature,
                                seeds=[seeds[i] for i in rows])
                responses += [part.response(i) for i in range(len(rows))]
                flop += part.flop
    rollout = Rollout.of([batch[i]["prompt_ids"] for i in mine], responses, pair.stop_ids)
    rollout.flop = flop
    if config.window != "prefix":
        rest = (rollout.lens - prefix_len).clamp(min=0)  # tokens outside the window
        start = {"first": rest * 0, "last": rest, "random": (window_draw * (rest + 1)).long()}[config.window]
        rollout.supervised = torch.stack((start, (start + prefix_len).minimum(rollout.lens)), dim=1)
    rollout.for_teacher = rollout.with_prompts([batch[i]["teacher_ids"] for i in mine])
    return rollout


# --- the loop


def even_micro_batches(rollout: Rollout, micro_tokens: int) -> tuple[list[Tensor], int]:
    """This rank's micro-batches, and the supervised tokens of all ranks. A rank with fewer micro-batches than others
    gets some without rows, since with --shard all wait for each other in every forward."""
    mine = list(rollout.micro_batches(micro_tokens))
    counts, supervised = zip(*all_gather((len(mine), rollout.num_supervised())))
    nothing = torch.zeros(0, dtype=torch.long)
    return mine + [nothing] * (max(counts) - len(mine)), sum(supervised)


def learning_rate(step: int, config: Config) -> float:
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.lr_schedule == "constant":
        return config.lr
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * 0.5 * (1 + math.cos(math.pi * progress))


def due(run: Run, config: Config) -> bool:
    """Whether to evaluate now: before the first step (pretrained weights, --eval_every 0 or more), every --eval_every
    steps, and after the last; not when interrupted, nor what a resumed run has done already. All ranks ask together."""
    if run.step == 0:
        wanted = config.eval_every >= 0 and config.init == "pretrained"  # random weights have nothing to measure
    else:
        wanted = run.step == config.steps or (config.eval_every > 0 and run.step % config.eval_every == 0)
    return wanted and not run.stopping() and not any("eval" in r and r["step"] == run.step for r in run.records())


def train(config: Config) -> None:
    join()
    resume_from = restore_flags(config) if config.resume else None
    fill_in(config)
    if config.plan:
        plan(config)
        return
    try:
        with claim(config):  # no other run may write to --out_dir meanwhile
            distill(config, resume_from)
        leave()
    finally:
        for number in ENDING:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def distill(config: Config, resume_from: Path | None) -> None:
    Clock.moment = all_gather(Clock.moment)[0]  # the date that chat templates may print: rank 0's on every rank
    rows, test = read_prompts(config)  # before the models, which may have to be downloaded
    pair = load_pair(config, resume_from)
    prepare_prompts(config, rows, test, pair)
    student, teacher, device = pair.student, pair.teacher, pair.sampler.device
    optimizer = torch.optim.AdamW(student.parameters(), lr=config.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    loss_options = {"loss": config.loss, "temperature": config.temperature, "beta": config.beta, "top_k": config.top_k,
                    "vocab": pair.vocab, "stop_ids": pair.merged_stops if config.scored else ()}
    autocast = {"device_type": device.type, "dtype": pair.dtype,
                "enabled": pair.dtype.itemsize < 4 and config.shard == 1}  # --shard casts by itself
    inputs = {"file of --data": zlib.crc32(resolve(config.data, "train").read_bytes())}
    inputs["surroundings of prompts"] = pair.tokenizer.surroundings()  # what the chat template puts around a prompt
    if teacher is not None:
        inputs["surroundings of the teacher's prompts"] = pair.teacher_tokenizer.surroundings()
        inputs["teacher's weights"] = fingerprint(checkpoint_folder(config.teacher))
    run = Run(config, pair, optimizer, resume_from, inputs)
    print(f"{len(rows):,} prompts, {len(test):,} held-out; {device}" + f", {world_size()} ranks" * (world_size() > 1))
    with say_what_to_change(run):
        run.stage = "sampling"
        if teacher is not None and resume_from is None:
            few, length = batch_of(rows, 0, config)[:8], min(config.prefix_len, config.max_new_tokens)
            print("\n".join(preflight(pair, few, length, config.temperature, config.seed)))

        # A signal ends the run after its step. (torchrun's SIGTERM means that another rank has died: nothing to save.)
        for number in ENDING if world_size() == 1 else ENDING[:1]:
            signal.signal(number, run.interrupt)
        bar = tqdm(initial=run.step, total=config.steps, desc="train", disable=True if rank() else None)
        while True:
            run.stage = "evaluation"
            if test and due(run, config):
                examine(pair, test, config, run)
            if run.stopping() or run.step >= config.steps:
                break

            # 1. sample: responses to this rank's prompts of the batch, cut after prefix_len tokens (see `respond`)
            run.stage = "sampling"
            start = now(device)
            prefix_len = prefix_len_at(run.step, config, run.adaptive)
            rollout = respond(batch_of(rows, run.step, config), run.step, prefix_len, config, pair)
            micro_batches, n = even_micro_batches(rollout, config.micro_tokens)
            sample_end = now(device)

            run.stage = "learning"
            parts = []
            for its_rows in micro_batches:
                # 2. score: the teacher reads the same responses
                hidden_t = head_t = None
                if config.scored:
                    tokens_t, at_t, _, _ = rollout.for_teacher.part(its_rows, teacher.device)  # (b, T-1), (n,)
                    with torch.no_grad():
                        hidden_t = teacher(tokens_t).flatten(0, 1)[at_t].to(device)  # (n, H_t)
                    head_t = teacher.head.to(device)

                # 3. learn: a token weighs 1 / (supervised tokens of the step), however the step is split
                tokens, at, targets, position = rollout.part(its_rows, device)
                with torch.autocast(**autocast):
                    hidden_s = student(tokens).flatten(0, 1)[at].to(pair.dtype)  # (n, H_s)
                weights = torch.full((len(at),), 1 / n, device=device)
                loss, row_stats = distill_loss(
                    hidden_s, student.head, hidden_t, head_t, token_weights=weights, targets=targets, **loss_options,
                )
                loss.backward()
                parts.append(row_stats | {"position": position})
            stats = {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}
            must_be_finite(stats)

            if config.shard == 1:  # else backward has done it
                all_reduce([p.grad for p in student.parameters()])
            grad_norm = float(full_tensor(torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)))
            if not math.isfinite(grad_norm):
                raise FloatingPointError("the loss is finite, but the gradient is not")
            optimizer.param_groups[0]["lr"] = learning_rate(run.step, config)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if pair.sampler is not student:
                pair.sampler.copy_from(student)

            # log, save
            run.step += 1
            run.stage = "saving"
            seconds = {"seconds_sample": sample_end - start, "seconds_learn": now(device) - sample_end}
            log_step(run, pair, rollout, stats, seconds, prefix_len, grad_norm, bar)
            if run.step == config.steps or (config.save_every and run.step % config.save_every == 0):
                run.save()
        if run.step and run.saved != run.checkpoint:  # interrupted
            run.stage = "saving"
            run.save()
    bar.close()
    run.summarize()


def log_step(
    run: Run, pair: Pair, rollout: Rollout, stats: dict, seconds: dict, prefix_len: int, grad_norm: float, bar: tqdm
) -> None:
    """Gather a step from all ranks, its statistics by token and the lengths of its responses, write its record to
    log.jsonl (data/readme.md explains the fields) and show it: in a terminal a bar; into a file a line now and then.
    Also take the adaptive prefix to its next state."""
    ranks = all_gather({"stats": stats, "lens": rollout.lens, "finished": rollout.finished,
                        "flops": step_flops(pair, rollout, run.config)})
    stats = {name: torch.cat([r["stats"][name] for r in ranks]) for name in ranks[0]["stats"]}
    lens, finished = (torch.cat([r[name] for r in ranks]) for name in ("lens", "finished"))
    flops = {name: sum(r["flops"][name] for r in ranks) for name in ranks[0]["flops"]}
    n, took = len(stats["position"]), sum(seconds.values())
    if run.config.schedule == "adaptive":
        run.adaptive = grow(run.adaptive, stats["kl"], stats["position"], lens, run.config)
    record = {
        "step": run.step, **{name: x.double().mean().item() for name, x in stats.items() if name != "position"},
        "kl_by_position": by_position(stats["kl"], stats["position"]) if "kl" in stats else {},
        "finish": finished.double().mean().item(), "response_len": lens.double().mean().item(), "tokens": n, **flops,
        **seconds, "tokens_per_s": n / took, "flop_per_s": sum(flops.values()) / took, "prefix_len": prefix_len,
        "lr": run.optimizer.param_groups[0]["lr"], "grad_norm": grad_norm,
        "peak_memory": peak_memory(pair.sampler.device),
    }
    run.write(record)
    said = f"loss {record['loss']:.4f}, prefix_len {prefix_len}, finished {record['finish']:.0%}, {n / took:,.0f} tok/s"
    bar.set_postfix_str(said, refresh=False)
    bar.update()
    if bar.disable and run.step % max(1, bar.total // 10) == 0:
        print(f"step {run.step}: {said}", flush=True)


def examine(pair: Pair, test: list[dict], config: Config, run: Run) -> None:
    """Measure the student on held-out problems, all on the same sampled responses: accuracy, P(finish), lengths, the KL
    to the teacher by position, and what a response of full length costs. One record in the log, one line, and one
    response to look at."""
    start = time.perf_counter()
    pair.sampler.cache = None  # else `cache_for` would grow it to the most rows and the most positions of both uses
    record, answers = evaluate(
        pair.sampler, pair.tokenizer, test, max_new_tokens=config.max_new_tokens, stop_ids=pair.stop_ids,
        temperature=config.temperature, slots=config.eval_batch_size,
    )
    said = f"P(finish) {record['finish']:.3f}, mean length {record['mean_len']:,.0f}"
    if "accuracy" in record:
        said = f"accuracy {record['accuracy']:.3f} (95%: {record['low']:.3f} to {record['high']:.3f}), {said}"
    if config.eval_kl and pair.teacher is not None:
        prompts, responses = [row["prompt_ids"] for row in test], [answer["ids"] for answer in answers]
        rollout = Rollout.of(prompts[: config.eval_kl], responses[: config.eval_kl], pair.stop_ids)
        rollout.for_teacher = rollout.with_prompts([row["teacher_ids"] for row in test[: config.eval_kl]])
        stats = score(rollout, pair.sampler, pair.teacher, stop_ids=pair.merged_stops, temperature=config.temperature,
                      micro_tokens=config.micro_tokens)
        must_be_finite(stats)
        kl, position, prefix_len = stats["kl"], stats["position"], prefix_len_at(run.step, config, run.adaptive)
        record |= {"kl": kl.mean().item(), "kl_by_position": by_position(kl, position),
                   "kl_in_prefix": (kl[position < prefix_len].sum() / kl.sum().clamp(min=1e-30)).item()}
        said += f", KL to the teacher {record['kl']:.4f} nats per token"
        if run.step == 0:
            said += f"; the first {prefix_len:,} tokens hold {record['kl_in_prefix']:.0%} of it"
        flops = step_flops(pair, rollout, config)  # flop_sample is 0 here; sampling costs a forward, 1/3 of learning
        record["flop_per_whole_response"] = (sum(flops.values()) + flops["flop_student"] / 3) / len(rollout.lens)
    pair.sampler.cache = None
    run.write({"step": run.step, "eval": "sampled", **record, "seconds": time.perf_counter() - start})
    print(f"step {run.step}, {len(test)} held-out problems: {said}\nthe first of them:\n"
          f"{shorten(test[0]['prompt'].strip(), 8)}\nits response:\n{shorten(answers[0]['response'], 12)}", flush=True)


def peak_memory(device: torch.device) -> int:
    """Most bytes allocated on the device at once since the last call; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return peak


def now(device: torch.device) -> float:
    """Seconds, after all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def must_be_finite(stats: dict[str, Tensor]) -> None:
    """Raise FloatingPointError where a token's loss is not finite, naming places and cause."""
    wrong = ~stats["loss"].isfinite()
    if bool(wrong.any()):
        broken = [who for who in ("teacher", "student")
                  if f"{who}_logprob" in stats and not stats[f"{who}_logprob"].isfinite().all()]
        raise FloatingPointError(f"the loss is not finite at response positions {stats['position'][wrong].tolist()[:5]}"
                                 + (f", nor is what the {' and the '.join(broken)} says there" if broken else ""))


@contextmanager
def say_what_to_change(run: Run):
    """Wraps the loop. When memory runs out or a number is not finite, raise InputError naming the flag to change. A run
    of one process first saves the state after its last whole step; so also when writing fails, or Ctrl-C comes twice,
    but then not in "learning": weights may be half changed. Several ranks save nothing: their last checkpoint counts.
    """
    def save() -> None:
        if run.step and world_size() == 1 and run.saved != run.checkpoint:
            run.save()

    try:
        yield
    except (OSError, KeyboardInterrupt) as error:  # printing to what is gone, a full disk; a second Ctrl-C
        if isinstance(error, OSError) or run.stage != "learning":  # where weights may be half changed
            save()
            print(f"the last state saved is {run.saved}" if run.saved else "nothing was saved")
        raise
    except (FloatingPointError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not out_of_memory(error):
            raise
        save()
        anew = "in another run"  # with --resume these flags must stay
        if isinstance(error, FloatingPointError):
            what, mend = error, f"Lower --lr, or use --dtype float32, {anew}"
        else:
            what = f"out of memory in {run.stage}"
            whole = run.config.mix or run.config.window != "prefix"
            start = f", from --student {run.saved}" * bool(run.saved)
            lower = {"sampling": f"--batch_size or --{'max_new_tokens' if whole else 'prefix_len'} {anew}{start}",
                     "evaluation": "--eval_batch_size or --micro_tokens"}
            mend = f"Lower {lower.get(run.stage, '--micro_tokens, or add --recompute')}"
        kept = f"the last state saved is {run.saved}" if run.saved else "nothing was saved"
        step = run.step + (run.stage not in ("evaluation", "saving"))
        raise InputError(f"step {step}: {what}; {kept}. {mend}") from None


# --- what a step costs


def step_flops(pair: Pair, rollout: Rollout, config: Config) -> dict[str, float]:
    """Matmul FLOP of a step on this rollout, of the tokens really processed, padding not counted. What --recompute
    computes twice is counted once."""
    read, read_t = (r.prompt_lens + r.supervised[:, 1] - 1 for r in (rollout, rollout.for_teacher))
    n = rollout.num_supervised()
    return {"flop_sample": rollout.flop,
            "flop_teacher": count_flops(pair.teacher.config, read_t, n) if config.scored else 0.0,
            "flop_student": 3 * count_flops(pair.student.config, read, n)}


def plan(config: Config) -> dict[str, float]:
    """Print parameters, memory by part and FLOP by prefix length, from the two configurations alone. Returns bytes per
    device "while sampling", "while learning" and "while evaluating". Every response is taken to be as long as can be.
    Parts of a few percent are not counted.
    """
    prompt, prompt_t = 64, 512 if config.teacher_prompt else 64
    whole = max(config.max_new_tokens, config.prefix_len if config.window == "prefix" else 0)
    length = whole if config.mix or config.window != "prefix" else config.prefix_len
    teacher_writes = config.mix > 0 or config.rollout == "teacher"
    on_gpu = (config.device or choose_device("").type).startswith("cuda")  # a plan may be for a GPU that is not here
    size = 2 if (config.dtype or ("bfloat16" if on_gpu else "float32")) == "bfloat16" else 4
    s, t = load_config(checkpoint_folder(config.student, ("config.json",))), None
    if config.teacher:
        scores = not (teacher_writes or config.shard_teacher)  # and does nothing else
        t = load_config(checkpoint_folder(config.teacher, ("config.json",)), any_family=scores).get_text_config()
    P, P_t = count_parameters(s), count_parameters(t) if t is not None else 0
    V, H, layers, rows = s.vocab_size, s.hidden_size, s.num_hidden_layers, math.ceil(config.batch_size / config.world)
    # What autograd keeps of a token in a block: inputs of norms in float32, inputs of products in `size` bytes.
    heads = (s.num_attention_heads + s.num_key_value_heads) * head_dim_of(s)
    block = 4 * (4 * H + 2 * heads * (s.model_type == "qwen3")) + size * (2 * H + 2 * heads + 4 * s.intermediate_size)
    tokens = max(config.micro_tokens, prompt + length)
    writers = {"student": [s, t] if config.mix else [s], "teacher": [t], "data": []}[config.rollout]
    kv, kv_s = (sum(2 * size * w.num_hidden_layers * w.num_key_value_heads * head_dim_of(w) for w in models)
                for models in (writers, [s]))  # bytes per token
    slots = min(rows, MAX_SLOTS)
    asked = min(config.eval_batch_size, math.ceil((config.eval_problems or config.eval_kl) / config.world))
    always = {
        "student: float32 weights": 4 * P / config.shard, "student: AdamW's moments": 8 * P / config.shard,
        "student: copy that samples": size * P * (size < 4 or config.shard > 1),
        "teacher": 0 if config.teacher_device else size * P_t / (config.shard if config.shard_teacher else 1)}
    cache = {"KV cache": kv * ((prompt_t if teacher_writes else prompt) + length) * slots}
    # --shard gathers for a forward: both models' embeddings and heads, and two of the student's blocks at a time.
    gathered = size * (V * H * (2 - s.tie_word_embeddings) + 2 * P // layers) if config.shard > 1 else 0
    gathered += 2 * size * t.vocab_size * t.hidden_size if config.shard_teacher else 0
    sampling = cache | {"logits of the new tokens": slots * V * 24}  # sample_token: two in float32, two in float64
    chunk = {"logits of a chunk": min(CHUNK_ROWS, tokens) * V * 4 * (9 if on_gpu else 2.5)}
    evaluating = {"KV cache of evaluation": kv_s * (prompt + config.max_new_tokens) * asked,
                  "logits of evaluation": asked * V * 24} | chunk if asked else {}
    learning = cache | chunk | {
        "weights gathered by --shard": gathered, "gradients": 4 * P / config.shard, "gradient of the head": 4 * V * H,
        "activations kept for backward": tokens * (4 * H * layers + block if config.recompute else block * layers)}
    apart = f", {size * P_t / 1e9:.1f} GB on {config.teacher_device}" if config.teacher_device else ""
    teacher = f"; teacher {config.teacher}: {P_t:,}{apart}" if P_t else ""
    print(f"student {config.student}: {P:,} parameters{teacher}"
          f"\nassumed: prompts of {prompt} tokens ({prompt_t} to the teacher), whole responses of {whole}, {rows} of "
          f"{config.batch_size} rows on a device ({asked} in evaluation), micro-batches of {config.micro_tokens} "
          f"tokens, {size}-byte numbers in forward passes "
          f"({'GPU' if on_gpu else 'CPU; --device cuda plans for a GPU that is not here'})\n\n"
          "memory of a device, GB of 1e9 bytes, without what torch itself takes")
    found = {f"while {name}": sum(always.values()) + sum(more.values()) for name, more in (
        ("sampling", sampling), ("learning", learning), ("evaluating", evaluating)) if more}
    memory = always | sampling | learning | evaluating
    for part, b in (memory | {f"in all, {name}": b for name, b in found.items()}).items():
        print(f"  {part:40}{b / 1e9:10.3f}")

    def flops(writer, length: int, window: str = "prefix") -> list[float]:
        """Of sampling, scoring and learning from `length` tokens of one response."""
        written = length if window == "prefix" else whole
        last = {"random": (whole + length) / 2, "last": whole}.get(window, length)  # of the tokens that are read
        wrote = torch.tensor([(prompt_t if writer is t else prompt) + written - 1.0])
        read, read_t = (torch.tensor([n + last - 1.0]) for n in (prompt, prompt_t))
        return [count_flops(writer, wrote, written) if writer is not None else 0.0,
                count_flops(t, read_t, length) if config.scored else 0.0, 3 * count_flops(s, read, length)]

    writer = writers[0] if writers else None
    by_teacher = flops(t, config.max_new_tokens) if config.mix else [0.0] * 3
    print(f"\nTFLOP per step with {'windows of' if config.window != 'prefix' else 'responses cut at'} prefix_len"
          "\n  prefix_len     sampling      teacher      student"
          "          all  saving")
    for cut in sorted({min(config.prefix_len, whole), whole, *(whole >> k for k in range(1, 8) if whole >> k)}):
        parts = [(1 - config.mix) * a + config.mix * b for a, b in zip(flops(writer, cut, config.window), by_teacher)]
        shown = (f"{config.batch_size * x / 1e12:12.4g}" for x in (*parts, sum(parts)))
        print(f"  {cut:10,} {' '.join(shown)}  {sum(flops(writer, whole)) / sum(parts):5.1f}x")
    return found


if __name__ == "__main__":
    run_command(train, parse_flags(Config, __doc__))
