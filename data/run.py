"""What a run starts from and leaves behind: its flags checked, its pair and prompts loaded, and its folder, with
config.json, log.jsonl, and checkpoints `step_NNNNNN/` that are whole or not there at all.

A checkpoint is the student as a Hugging Face folder, the optimizer's moments, and a JSON state. Randomness and the data
order are functions of (seed, step), so nothing else is needed to go on bit for bit (on one machine). `config` is
train.py's Config throughout.
"""

import importlib.util
import json
import math
import os
import re
import shutil
import zlib
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from data import HERE, InputError, load_jsonl, read_json, resolve
from data.prefix import longest_response
from data.tokenizer import Tokenizer, check_same
from loss import LOSSES
from model import Transformer, checkpoint_folder, load_config
from sample import out_of_memory


def check_flags(config) -> None:
    choices = {
        "init": ("pretrained", "random"), "rollout": ("student", "teacher", "data"), "loss": LOSSES,
        "top_k_of": ("teacher", "student"), "schedule": ("constant", "linear", "staircase", "adaptive"),
        "window": ("prefix", "first", "last", "random"), "lr_schedule": ("constant", "cosine"),
        "dtype": ("", "float32", "bfloat16"),
    }
    for name, allowed in choices.items():
        if getattr(config, name) not in allowed:
            raise InputError(f"--{name} {getattr(config, name)}: expected one of {', '.join(filter(None, allowed))}")
    bounds = (
        ("at least 1", 1, math.inf, "prefix_len steps batch_size max_new_tokens keep top_k prefix_start stair"),
        ("at least 0", 0, math.inf, "warmup weight_decay grad_clip eval_every eval_problems eval_kl save_every seed"),
        ("at least 0", 0, math.inf, "memory schedule_steps full_every micro_batch teacher_prefix iw_gamma eps"),
        ("positive", 5e-324, 1.7e308, "lr temperature"),
        ("in [0, 1)", 0, 1 - 2**-53, "beta1 beta2"),
        ("between 0 and 1", 0, 1, "mix"),
    )
    for bound, least, most, names in bounds:
        for name in names.split():
            if not least <= getattr(config, name) <= most:
                raise InputError(f"--{name} must be {bound}, found {getattr(config, name)}")

    def refuse(clash: bool, message: str) -> None:
        if clash:
            raise InputError(message)

    c, follows = config, config.schedule == "adaptive" or config.iw_gamma > 0
    shortest = c.prefix_len if c.schedule == "constant" else c.prefix_start
    refuse(c.loss == "jsd" and not 0 < c.beta < 1, f"--beta must lie strictly between 0 and 1, found {c.beta}")
    refuse(c.loss == "sampled_kl" and (c.rollout != "student" or c.mix > 0),
           "--loss sampled_kl estimates from the student's own samples: use it with --rollout student and --mix 0")
    refuse(shortest > c.prefix_len, f"--prefix_start {c.prefix_start} lies above --prefix_len {c.prefix_len}")
    refuse(follows and c.loss == "cross_entropy",
           "--schedule adaptive and --iw_gamma follow the KL to the teacher, which --loss cross_entropy lacks")
    refuse((c.mix > 0 or c.teacher_prefix > 0) and c.rollout != "student",
           f"--mix and --teacher_prefix are for --rollout student, found --rollout {c.rollout}")
    refuse(bool(c.teacher_cache) and not teacher_writes(c), "--teacher_cache: in this run the teacher writes nothing")
    refuse(c.teacher_prefix >= shortest,
           f"--teacher_prefix {c.teacher_prefix} must lie below the shortest prefix, {shortest}")
    refuse(c.teacher_prefix > 0 and c.window != "prefix", "--teacher_prefix and --window exclude each other")
    refuse(bool(c.wandb_project) and importlib.util.find_spec("wandb") is None,
           "--wandb_project: there is no wandb here; pip install wandb")
    refuse(c.full_every > 0 and c.max_new_tokens <= c.prefix_len,
           f"--full_every: whole responses, of up to --max_new_tokens {c.max_new_tokens}, must have room for more than "
           f"--prefix_len {c.prefix_len}")
    refuse(c.mix > 0 and c.window != "prefix", "--mix and --window exclude each other")
    refuse(c.full_every > 0 and c.window != "prefix", "--full_every and --window exclude each other: a window already "
           "samples whole responses")
    refuse(0 < c.mix and round(c.mix * c.batch_size) == 0,
           f"--mix {c.mix} of --batch_size {c.batch_size} is less than one row: raise the one or the other")
    refuse(c.schedule == "adaptive" and c.window not in ("prefix", "first"),
           "--schedule adaptive follows the end of the prefix, which --window last and random have not")
    refuse(c.resume and c.overwrite, "--resume and --overwrite contradict each other")


def teacher_writes(config) -> bool:
    return config.rollout == "teacher" or config.mix > 0 or config.teacher_prefix > 0


def teacher_needed(config) -> bool:
    return teacher_writes(config) or config.loss != "cross_entropy"


def load_pair(config, device: torch.device, dtype: torch.dtype, resume_from: Path | None):
    """(student, teacher or None, tokenizer, the teacher's tokenizer or None, real vocabulary, stop ids of both).

    The student's weights are float32 for the optimizer: at a rate of 1e-6 a bfloat16 weight would round back to what it
    was.
    """
    folder = checkpoint_folder(config.student)
    tokenizer, teacher, theirs = Tokenizer(folder, config.chat, config.system, config.thinking), None, None
    vocab, stop_ids = tokenizer.vocab_size, {*tokenizer.stop_ids, *tokenizer.stop_ids_of(config.stop_tokens)}
    if teacher_needed(config):
        teacher_folder = checkpoint_folder(config.teacher)
        theirs = Tokenizer(teacher_folder, "off" if config.chat == "off" else "auto")
        if theirs.chats():
            switch = config.thinking if "enable_thinking" in (theirs.chat_template() or "") else ""
            theirs = Tokenizer(teacher_folder, config.chat, config.system, switch)
        check_same(tokenizer, theirs)
        vocab = min(vocab, theirs.vocab_size)
        stop_ids |= set(theirs.stop_ids)
        teacher = Transformer.from_pretrained(teacher_folder, device, dtype).requires_grad_(False)
    if resume_from is None and config.init == "random":
        student = Transformer(load_config(folder)).initialize(config.seed).to(device)
    else:
        student = Transformer.from_pretrained(resume_from or folder, device, torch.float32)
    student.recompute = config.recompute
    for name, model in (("student", student), ("teacher", teacher)):
        if model is not None and vocab > model.head.shape[0]:
            raise InputError(f"--{name}: its tokenizer has {vocab} ids, its head {model.head.shape[0]} rows")
    print(f"student {config.student}: {sum(p.numel() for p in student.parameters()):,} parameters, float32", end="")
    if teacher is not None:
        count = sum(p.numel() for p in teacher.parameters())
        print(f"; teacher {config.teacher}: {count:,}, {config.dtype}", end="")
    stop_ids = tuple(sorted(i for i in stop_ids if i < vocab))
    print(f"\nvocabulary {vocab:,} of {student.head.shape[0]:,} rows; stop tokens "
          + ", ".join(f"{i} {tokenizer.decode([i])!r}" for i in stop_ids)
          + (" (one class)" if config.stop_class and len(stop_ids) > 1 else ""))
    return student, teacher, tokenizer, theirs, vocab, stop_ids


def read_prompts(config) -> tuple[list[dict], list[dict]]:
    """(rows to train on, rows to be judged on)."""
    need = ("prompt", "solution") if config.rollout == "data" else ("prompt",)
    rows, test = load_jsonl(resolve(config.data, "train"), need), []
    if not config.eval_problems and not config.eval_kl:
        return rows, test
    own = (HERE / config.data / "test.jsonl").is_file()
    if config.eval_data or own:
        need = ("prompt", "answer") if config.eval_problems else ("prompt",)
        file = resolve(config.eval_data or config.data, "test", "eval_data" if config.eval_data else "data")
        try:
            test = load_jsonl(file, need)
        except InputError as error:
            mend = "; --eval_problems 0 measures only the KL, which needs none" if '"answer"' in str(error) else ""
            raise InputError(f"{error}{mend}") from None
    elif config.eval_every:
        raise InputError(f"--eval_every {config.eval_every}: --data {config.data} has no held-out problems; give some "
                         "with --eval_data")  # fmt: skip
    else:
        print("no held-out problems (--eval_data): only the training loss will be known")
    return rows, test


def encode_prompts(config, rows: list[dict], tokenizer: Tokenizer, models: list[Transformer]) -> int:
    """Adds `prompt_ids` to the rows (and `solution_ids`). Returns the tokens of the longest prompt and response
    together, which the models must have room for."""
    for row in tqdm(rows, desc="tokenize", leave=False, delay=2):
        row["prompt_ids"] = tokenizer.encode_prompt(row["prompt"])
        if config.rollout == "data":
            row["solution_ids"] = tokenizer.encode(row["solution"])
        if not row["prompt_ids"]:
            raise InputError(f"--data {config.data}: a prompt is empty, and this tokenizer puts nothing before it")
    cap, longest = longest_response(config), max(len(row["prompt_ids"]) for row in rows)
    flag_name = "prefix_len" if cap == config.prefix_len else "max_new_tokens"
    for model in models:
        if longest + cap > model.config.max_position_embeddings:
            raise InputError(
                f"--{flag_name} {cap} and the longest prompt of --data, {longest} tokens, exceed the "
                f"{model.config.max_position_embeddings} positions of the model: lower the one or shorten the other"
            )
    return longest + cap


# Between a run and its resumption. Those of the second line change the last bits of the arithmetic at most.
MAY_CHANGE = {"steps", "eval_every", "save_every", "keep", "resume", "overwrite", "out_dir", "wandb_project", "plan",
              "plan_lens", "device", "micro_batch", "memory", "recompute", "compile"}  # fmt: skip


def find_run(config) -> Path | None:
    """The checkpoint to resume from, or None for a fresh run. Refuses what would destroy or mix up an earlier run. On
    --resume, `config` gets the run's own settings for all flags that were not typed."""
    out = Path(config.out_dir)
    if out.exists() and not out.is_dir():
        raise InputError(f"--out_dir {out} is a file, expected a folder")
    if config.resume:
        complete = checkpoints(out)
        if not complete:
            raise InputError(f"--resume: no complete checkpoint in --out_dir {out}")
        before = read_json(complete[-1] / "state.json")["config"]
        config.micro_batch = config.micro_batch or before["micro_batch"]  # as it was chosen then, for the last bits
        for name in before.keys() - {"resume", "overwrite", "out_dir", "plan"}:  # flags that were not typed stay
            if hasattr(config, name) and name not in getattr(config, "typed", before):
                setattr(config, name, before[name])
        now = asdict(config)
        was = {name: before.get(name, now[name]) for name in now if name not in ("resume", "overwrite", "out_dir")}
        differ = {name: f"--{name} is {now[name]!r} and was {w!r}" for name, w in was.items() if w != now[name]}
        barred = [line for name, line in differ.items() if name not in MAY_CHANGE]
        if barred:
            raise InputError(f"--resume of {out}: " + "; ".join(barred) + ". Only these may change: "
                             + ", ".join(f"--{name}" for name in now if name in MAY_CHANGE))  # fmt: skip
        for line in differ.values():
            print(f"resuming: {line}")
        paced = config.schedule in ("linear", "staircase") and not config.schedule_steps
        if config.steps != before["steps"] and (paced or config.lr_schedule == "cosine"):
            what = f"--schedule {config.schedule}; --schedule_steps would have freed it" if paced else "--lr_schedule"
            raise InputError(f"--resume: --steps cannot change, since --steps {before['steps']} set the pace of {what}")
        return complete[-1]
    if files_of_run(out) and not config.overwrite:
        go_on = "continue it with --resume, " if checkpoints(out) else ""
        raise InputError(f"--out_dir {out} already holds a run; {go_on}discard it with --overwrite")
    for name in ("student", "teacher"):
        if any(old.resolve() in (used := Path(getattr(config, name)).resolve(), *used.parents)
               for old in files_of_run(out)):  # fmt: skip
            raise InputError(f"--overwrite would delete --{name} {getattr(config, name)}: choose another --out_dir")
    return None


def checkpoints(out: Path) -> list[Path]:
    """Complete checkpoints, the oldest first. Other folders are none of ours, whatever they are called."""
    found = [f for f in out.glob("step_*") if re.fullmatch(r"step_\d{6,}", f.name) and (f / "state.json").is_file()]
    return sorted(found, key=lambda f: int(f.name.removeprefix("step_")))


def files_of_run(out: Path) -> list[Path]:
    return checkpoints(out) + [f for f in (out / "log.jsonl", out / "config.json") if f.exists()]


class Log:
    """A run's log.jsonl, a record a line; with --wandb_project, Weights & Biases gets the same numbers."""

    def __init__(self, config):
        self.path, self.wandb = Path(config.out_dir) / "log.jsonl", None
        if config.wandb_project:
            import wandb

            self.wandb = wandb
            wandb.init(project=config.wandb_project, name=Path(config.out_dir).name, config=asdict(config))

    def write(self, record: dict) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        if self.wandb is not None:
            prefix = "/".join(record[k] for k in ("eval", "manner") if k in record)
            self.wandb.log({f"{prefix}/{k}" if prefix else k: v for k, v in record.items() if not isinstance(v, str)})

    def records(self) -> list[dict]:
        return read_log(self.path) if self.path.is_file() else []

    def close(self) -> None:
        if self.wandb is not None:
            self.wandb.finish()


def open_run(config, resume_step: int | None) -> Log:
    """Make out_dir ready, once all there is to load has been loaded. Returns its log."""
    out, log = Path(config.out_dir), Path(config.out_dir) / "log.jsonl"
    if resume_step is None:
        for path in files_of_run(out):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.json").write_text(json.dumps(asdict(config), indent=1) + "\n")
    elif log.is_file():  # what was logged after the checkpoint will be logged again, and a torn last line goes
        rewrite_log(log, [r for r in read_log(log) if r["step"] <= resume_step])
    return Log(config)


def read_kept(file: Path, key: str) -> list[dict]:
    """The records of a file of kept responses, if it exists. Raises InputError if it is a file of another kind, which
    would be written over."""
    if not file.is_file() or not file.read_bytes().strip():
        return []
    try:
        records = read_log(file)
    except UnicodeDecodeError:
        records = []
    if not records or not isinstance(records[0], dict) or key not in records[0]:
        raise InputError(f"{file}: is there already and holds something else than responses: name another file")
    return records


def fingerprint(folder: Path) -> list[list]:
    """What tells a checkpoint's weights from others: name, size and a checksum of the last megabyte of each file."""
    found = []
    for file in sorted(folder.glob("*.safetensors")):
        with open(file, "rb") as handle:
            handle.seek(max(0, file.stat().st_size - 2**20))
            found.append([file.name, file.stat().st_size, zlib.crc32(handle.read())])
    return found


def read_log(log: Path) -> list[dict]:
    """The records of a log.jsonl up to the first line that a kill has torn."""
    records = []
    for line in log.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def rewrite_log(log: Path, records: list[dict]) -> None:
    temporary = log.with_name(log.name + ".incomplete")
    temporary.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    os.replace(temporary, log)


def save_checkpoint(
    config, student, tokenizer, stop_ids: tuple[int, ...], optimizer, step: int, totals: dict, growth: dict
) -> Path:
    """out_dir/step_NNNNNN: a Hugging Face folder plus what resuming needs. It appears whole or not at all."""
    out = Path(config.out_dir)
    final, temporary = out / f"step_{step:06d}", out / f".step_{step:06d}.incomplete"
    shutil.rmtree(temporary, ignore_errors=True)
    student.save_pretrained(temporary)
    tokenizer.save(temporary, stop_ids)
    names = {p: name for name, p in student.named_parameters()}
    moments = {
        f"{names[p]}.{key}": value.contiguous() for p, state in optimizer.state.items()
        for key, value in state.items() if key != "step"
    }
    save_file(moments, temporary / "optimizer.safetensors")
    (temporary / "state.json").write_text(
        json.dumps({"step": step, "totals": totals, "growth": growth, "config": asdict(config)}, indent=1)
    )
    for file in temporary.iterdir():  # on the disk before the name says so
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())
    shutil.rmtree(final, ignore_errors=True)
    os.replace(temporary, final)
    if os.name == "posix":
        folder = os.open(out, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    for old in checkpoints(out)[: -config.keep]:
        shutil.rmtree(old)
    return final


def load_checkpoint(folder: Path, student, optimizer) -> tuple[int, dict, dict]:
    state = read_json(folder / "state.json")
    file = folder / "optimizer.safetensors"
    try:
        moments = load_file(file, device=str(student.head.device))
        for name, p in student.named_parameters():
            optimizer.state[p] = {key: moments[f"{name}.{key}"] for key in ("exp_avg", "exp_avg_sq")}
            optimizer.state[p]["step"] = torch.tensor(float(state["step"]), device=p.device)  # as fused AdamW wants it
    except (OSError, SafetensorError, KeyError) as error:
        raise InputError(f"{file}: not a complete optimizer state ({error}). Delete {folder} to resume from the "
                         "checkpoint before it") from None  # fmt: skip
    return state["step"], state["totals"], state["growth"]


def must_be_finite(losses: torch.Tensor, position: torch.Tensor, number: int, hidden_t, hidden_s) -> None:
    """Raise FloatingPointError where a loss of micro-batch `number` is not finite, naming places and causes."""
    if not torch.isfinite(losses).all():
        parts = {"the teacher's hidden states": hidden_t, "the student's hidden states": hidden_s}
        broken = [name for name, x in parts.items() if x is not None and not torch.isfinite(x).all()]
        where = position[~torch.isfinite(losses).cpu()].tolist()
        raise FloatingPointError(f"micro-batch {number}: the loss is not finite at response positions {where[:5]}; "
                                 f"not finite either: {' and '.join(broken) or 'nothing before it'}")  # fmt: skip


def failure_of(error: Exception, step: int, kept_state, config) -> Exception:
    """What to raise where learning failed in a step: with where the state is (kept_state() saves it) and what to do."""
    if isinstance(error, FloatingPointError):
        return InputError(f"step {step}, {error}; {kept_state()}. Start another run from that --student with a lower "
                          "--lr or --grad_clip, or --dtype float32")  # fmt: skip
    if not out_of_memory(error):
        return error
    return InputError(f"step {step}: out of memory while learning ({str(error).split('.')[0]}); {kept_state()}. Go on "
                      f"with --resume and a lower --micro_batch (it was {config.micro_batch}), or with --recompute")


def summarize(log_path: Path, saved: Path, cut: bool) -> None:
    """Print a run's last block, read from the log: what was learned, what it cost, where it lies."""
    records = read_log(log_path)
    steps, judged = [r for r in records if "loss" in r], [r for r in records if "eval" in r]
    first, final = steps[0], steps[-1]
    note = " (interrupted; go on with --resume)" if cut else ""
    alike = first["prefix_len"] == final["prefix_len"]
    ends = [f"{r['loss']:.4f}" + ("" if alike else f" (prefix_len {r['prefix_len']})") for r in (first, final)]
    print(f"\nafter {final['step']} steps{note}: loss {' -> '.join(ends)}")
    for manner in ("greedy", "sampled", "kl"):
        mine = [r for r in judged if r["eval"] == "student" and r["manner"] == manner]
        if not mine or mine[-1]["step"] != final["step"]:
            continue
        key, last = "kl" if manner == "kl" else "accuracy", mine[-1]
        change = (f"{mine[0][key]:.3f} -> " if mine[0]["step"] == 0 else "") + f"{last[key]:.3f}"
        if manner == "kl":
            print(
                f"  student, held-out KL:       {change} nats a token, over whole responses of "
                f"{last['response_len']:.0f} tokens"
            )
        else:
            print(
                f"  student, {manner + ' accuracy:':18} {change} (95%: {last['low']:.3f} to {last['high']:.3f}), "
                f"P(finish) {last['finish']:.3f}, mean length {last['mean_len']:.0f}"
            )
    for r in judged:
        if r["eval"] == "teacher":
            print(f"  teacher, greedy accuracy:   {r['accuracy']:.3f}, mean length {r['mean_len']:.0f}")
    spent = {part: sum(r[f"seconds_{part}"] for r in steps) for part in ("sample", "teacher", "student")}
    print("  seconds: " + ", ".join(f"{part} {s:.1f}" for part, s in spent.items())
          + f"; all steps {final['total_seconds']:.1f}, evaluations {sum(r['seconds'] for r in judged):.1f}")
    print(f"  {final['total_tokens_trained']:,} tokens trained on, {final['total_flop'] / 1e12:.3g} TFLOP, "
          f"{final['total_flop'] / final['total_seconds'] / 1e9:.1f} GFLOP/s")
    config = read_json(log_path.with_name("config.json"))
    data = config["eval_data"] or config["data"]
    also = "" if data == "chains" else f" --data {data}"
    print(f"  checkpoint {saved}\n  talk to it: python sample.py --model {saved}{also}\n  log {log_path}")


class ResponseCache:
    """The teacher's responses in a JSON-lines file: first a record of what they depend on, then one a prompt.

    A line is written when a response is; one torn by a kill is dropped. A run that is resumed at first_step forgets
    what it had written from that step on: it will be written, and paid for in the books, again. Raises InputError when
    the file holds responses of another teacher or of other settings, or is no such file.
    """

    def __init__(self, config, stop_ids: tuple[int, ...], first_step: int = 0):
        self.path, self.run, self.responses = Path(config.teacher_cache), config.out_dir, {}
        names = ("teacher", "data", "temperature", "chat", "system", "thinking", "seed")
        made = {name: getattr(config, name) for name in names}
        made["cap"] = longest_response(config)
        made["stop_ids"], made["weights"] = list(stop_ids), fingerprint(checkpoint_folder(config.teacher))
        records = read_kept(self.path, "teacher")
        for name, value in made.items():
            if records and records[0].get(name) != value:
                raise InputError(f"--teacher_cache {self.path} was made with {name} {records[0].get(name)!r}, this run "
                                 f"has {value!r}: name another file, or delete it")  # fmt: skip
        try:
            kept = [r for r in records[1:] if not first_step or r["run"] != self.run or r["step"] < first_step]
            self.responses = {tuple(r["prompt_ids"]): r["response"] for r in kept}
            rewrite_log(self.path, [made, *kept])
        except (KeyError, TypeError, OSError) as error:
            raise InputError(f"--teacher_cache {self.path}: cannot be used ({error!r})") from None

    def add(self, prompt_ids: list[int], response: list[int], step: int) -> None:
        self.responses[tuple(prompt_ids)] = response
        record = {"prompt_ids": prompt_ids, "response": response, "run": self.run, "step": step}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
