"""A run's folder: config.json, log.jsonl, and checkpoints `step_NNNNNN/` that are whole or not there at all.

A checkpoint is the student as a Hugging Face folder, the optimizer's moments, and a JSON state. Randomness and the data
order are functions of (seed, step), so nothing else is needed to go on bit for bit (on one machine). `config` is
train.py's Config throughout.
"""

import json
import os
import re
import reprlib
import shutil
import signal
import zlib
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from data import InputError, parse_object, read_json
from data.ranks import collect, gather, like, rank

try:
    import fcntl
except ImportError:  # Windows: no lock there
    fcntl = None

TOTALS = ("tokens_sampled", "tokens_trained", "flop", "seconds")  # counters of a run
KEEP = 2  # checkpoints of a run that stay
LOCK = ".train.lock"
# Flags that may change between a run and its resumption. Those of the second line change the last bits at most.
MAY_CHANGE = {"steps", "eval_every", "save_every", "resume", "overwrite", "out_dir", "plan", "world",
              "device", "teacher_device", "micro_tokens", "recompute", "compile", "shard", "shard_teacher"}


def restore_flags(config) -> Path:
    """The checkpoint to resume from. `config` gets the run's own settings for all flags that were not given on the
    command line; those that were given must not change what the run is."""
    out = Path(config.out_dir)
    if config.overwrite:
        raise InputError("--resume and --overwrite contradict each other")
    complete = checkpoints(out)
    if not complete:
        raise InputError(f"--resume: no complete checkpoint in --out_dir {out}")
    before = read_state(complete[-1], config)["config"]
    given = getattr(config, "typed", set(before))  # a config made in code means all it says
    now, own = asdict(config), ("resume", "overwrite", "out_dir", "plan", "world")
    for name in now.keys() & before.keys() - {*own}:
        empty = name in ("student", "teacher", "prefix_start", "dtype") and not now[name]  # filled in later
        if name not in given or empty:
            setattr(config, name, before[name])
    now = asdict(config)
    was = {name: before.get(name, now[name]) for name in now if name not in own}
    differ = {name: f"--{name} is {now[name]!r} and was {w!r}" for name, w in was.items() if w != now[name]}
    barred = [line for name, line in differ.items() if name not in MAY_CHANGE]
    if barred:
        raise InputError(f"--resume of {out}: " + "; ".join(barred) + ". Only these may change: "
                         + ", ".join(f"--{name}" for name in now if name in MAY_CHANGE))
    for line in differ.values():
        print(f"resuming: {line}")
    for name, paces in (("schedule", ("linear", "staircase")), ("lr_schedule", ("cosine",))):
        if "steps" in differ and getattr(config, name) in paces:
            raise InputError(f"--resume: --steps cannot change: --steps {was['steps']} set the pace of "
                             f"--{name} {getattr(config, name)}")
    return complete[-1]


def read_state(folder: Path, config) -> dict:
    """A checkpoint's state.json. Raises InputError where a value is not of the kind that `save` writes."""
    file = folder / "state.json"
    state, known = read_json(file), {f.name: type(f.default) for f in fields(config)}
    parts = {name: part for name, part in state.items() if isinstance(part, dict)}
    kinds = {"step": int, "config.steps": int, "adaptive.prefix_len": int}
    kinds |= {f"totals.{name}": float for name in TOTALS}
    kinds |= {f"config.{name}": known[name] for name in parts.get("config", {}) if name in known}
    if parts.get("adaptive", {}).get("smooth") is not None:
        kinds |= {"adaptive.waited": int} | {f"adaptive.{name}": float for name in ("smooth", "lowest", "first")}
    for key, kind in kinds.items():
        part, _, name = key.rpartition(".")
        value = (parts.get(part, {}) if part else state).get(name)
        if type(value) not in ((int, float) if kind is float else (kind,)):
            raise InputError(f"{file}: {key} should be of type {kind.__name__}, found {reprlib.repr(value)}. Delete "
                             f"{folder} to resume from the checkpoint before it")
    if f"step_{state['step']:06d}" != folder.name or parts["adaptive"]["prefix_len"] < 1:
        raise InputError(f"{file}: its step {state['step']} or its adaptive.prefix_len cannot be true")
    return state


@contextmanager
def claim(config):
    """Hold --out_dir meanwhile. Refuses a folder where a fresh run would destroy an earlier run, a model, or anything
    that is no run's; that cannot be written to; or where another run is at work."""
    out = Path(config.out_dir)
    try:
        if not config.resume:
            protect(config, out)
        gather(None)  # all ranks have seen the folder as it was
        if rank() == 0:
            out.mkdir(parents=True, exist_ok=True)
            lock = open(out / LOCK, "a+")  # noqa: SIM115
    except OSError as error:
        raise InputError(f"--out_dir {out}: cannot be written to ({error.strerror}); choose another") from None
    if rank():
        yield
        return
    with lock:
        try:
            if fcntl is not None:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.seek(0)
            raise InputError(f"--out_dir {out}: process {lock.read()} is training there; wait for it, or choose "
                             "another") from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        try:
            yield
        finally:
            if [f.name for f in out.iterdir()] == [LOCK]:  # nothing came of it
                shutil.rmtree(out)


def protect(config, out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise InputError(f"--out_dir {out} is a file, expected a folder")
    ours, here = files_of_run(out), Path(os.path.realpath(out))
    if (out / "model.safetensors").exists() or (not ours and (out / "config.json").exists()):
        raise InputError(f"--out_dir {out} holds a model or a config.json that is none of a run's: choose another")
    for name in ("student", "teacher"):
        used = Path(os.path.realpath(getattr(config, name) or "-"))
        if used == here or here in used.parents or used in here.parents:
            raise InputError(f"--out_dir {out} is, holds or lies in --{name} {getattr(config, name)}: choose another")
    if any(f.name != "config.json" for f in ours) and not config.overwrite:  # else nothing came of the run before
        go_on = "continue it with --resume, " if checkpoints(out) else ""
        raise InputError(f"--out_dir {out} already holds a run; {go_on}discard it with --overwrite")


def checkpoints(out: Path) -> list[Path]:
    """Complete checkpoints, the oldest first. Other folders are none of ours, whatever they are called."""
    found = [f for f in out.glob("step_*") if re.fullmatch(r"step_\d{6,}", f.name) and (f / "state.json").is_file()]
    return sorted(found, key=lambda f: int(f.name.removeprefix("step_")))


def files_of_run(out: Path) -> list[Path]:
    """What --overwrite deletes. A folder without our log, our lock or a complete checkpoint is no run's."""
    found = checkpoints(out) + [f for f in (out / "log.jsonl",) if f.is_file()]
    return found + [f for f in (out / "config.json",) if (found or (out / LOCK).is_file()) and f.is_file()]


def remove(path: Path) -> None:
    """Delete a file or a checkpoint; a kill meanwhile leaves a name that is cleared when the run is opened again."""
    if path.is_dir():
        gone = path.with_name(f".{path.name}.old.incomplete")
        shutil.rmtree(gone, ignore_errors=True)
        os.replace(path, gone)
        shutil.rmtree(gone)
    else:
        path.unlink(missing_ok=True)


def read_log(log: Path) -> list[dict]:
    """The records of a .jsonl file up to the first line that is torn (by a kill) or no JSON object."""
    records = []
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            records.append(parse_object(line, log))
        except InputError:
            break
    return records


STEP = ("step", "loss", "finish", "seconds_sample", "seconds_learn", "total_flop", "total_seconds",
        "total_tokens_trained")  # numbers of a step's record, and of an evaluation's, that `summarize` needs
EVALUATION = {"kl": ("step", "seconds", "kl", "response_len"),
              "accuracy": ("step", "seconds", "accuracy", "low", "high", "finish", "mean_len", "rms_len")}


def check_records(records: list[dict], log: Path) -> None:
    """Raise InputError where a record of a run's log lacks what `summarize` needs."""
    for n, r in enumerate(records, start=1):
        needed = EVALUATION["kl" if r.get("kind") == "kl" else "accuracy"] if "eval" in r else STEP
        lacking = [name for name in needed if type(r.get(name)) not in (int, float)]
        lacking += [name for name in ("eval", "kind") if "eval" in r and not isinstance(r.get(name), str)]
        if lacking:
            raise InputError(f"{log}, line {n}: not a run's record, since {', '.join(lacking)} cannot be used")


def fingerprint(folder: Path) -> list[list]:
    """Identifies a checkpoint's weights: name, size and a checksum of the last megabyte of each file."""
    found: list[list] = []
    for file in sorted(folder.glob("*.safetensors")):
        with open(file, "rb") as handle:
            handle.seek(max(0, file.stat().st_size - 2**20))
            found.append([file.name, file.stat().st_size, zlib.crc32(handle.read())])
    return found


class Unbroken:
    """A standard stream whose reader may go away (`| head`): the run goes on without it."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> None:
        try:
            self.stream.write(text)
            self.stream.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


class Run:
    """The state of a run beside its models: `step` (steps made), `totals` (counters), `adaptive` (state of an adaptive
    prefix), `interrupted` (by Ctrl-C), and its folder on disk. Of several ranks, rank 0 writes and all read."""

    def __init__(self, config, pair, optimizer, resume_from: Path | None, inputs: dict):
        """inputs: checksums of what a resumed run must find unchanged, by what they are of."""
        self.config, self.student, self.tokenizer, self.stop_ids = config, pair.student, pair.tokenizer, pair.stop_ids
        self.optimizer, self.out, self.saved, self.inputs = optimizer, Path(config.out_dir), resume_from, inputs
        self.log, self.step, self.interrupted = self.out / "log.jsonl", 0, False
        self.totals = dict.fromkeys(TOTALS, 0)
        self.adaptive = {"prefix_len": config.prefix_start, "smooth": None}
        if resume_from is not None:
            self.load(resume_from)
        if rank() == 0:
            for torn in self.out.glob(".step_*.incomplete"):  # left by a kill
                shutil.rmtree(torn)
            if resume_from is None:
                for path in files_of_run(self.out):
                    remove(path)
            elif self.log.is_file():  # records after the checkpoint will be written again; a torn last line goes
                temporary = self.log.with_name("log.jsonl.incomplete")
                records = read_log(self.log)
                check_records(records, self.log)
                kept = [r for r in records if r["step"] <= self.step]
                temporary.write_text("".join(json.dumps(r) + "\n" for r in kept), encoding="utf-8")
                os.replace(temporary, self.log)
            (self.out / "config.json").write_text(json.dumps(asdict(config), indent=1) + "\n")
            need = 12 * sum(p.numel() for p in self.student.parameters()) * (KEEP + 1 - len(checkpoints(self.out)))
            if (free := shutil.disk_usage(self.out).free) < need:
                raise InputError(f"--out_dir {self.out}: checkpoints will take {need / 1e9:.1f} GB there and "
                                 f"{free / 1e9:.1f} GB are free; free some or choose another")
        gather(None)

    def interrupt(self, *_) -> None:
        """What Ctrl-C or SIGTERM does during the loop; a second one ends the process."""
        self.interrupted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def write(self, record: dict) -> None:
        if rank() == 0:
            with open(self.log, "a", encoding="utf-8") as file:
                file.write(json.dumps(record, allow_nan=False) + "\n")

    def records(self) -> list[dict]:
        """The log as rank 0 sees it, on every rank."""
        return gather(read_log(self.log) if rank() == 0 and self.log.is_file() else [])[0]

    def evaluated(self) -> bool:
        """Whether the student has been evaluated after its last step, in all that was asked for."""
        kinds = {r["kind"] for r in self.records() if r.get("eval") == "student" and r["step"] == self.step}
        wanted = {"greedy", "sampled"} if self.config.eval_problems else set()
        return wanted | ({"kl"} if self.config.eval_kl and self.config.teacher else set()) <= kinds

    def save(self) -> None:
        """Write out_dir/step_NNNNNN: a Hugging Face folder plus what resuming needs. It appears whole or not at all.
        All ranks call it, since a sharded student is collected from all; rank 0 writes, and the others wait for it."""
        final, temporary = self.out / f"step_{self.step:06d}", self.out / f".step_{self.step:06d}.incomplete"
        names = {p: name for name, p in self.student.named_parameters()}
        weights = collect({name: p for p, name in names.items()})
        moments = collect({f"{names[p]}.{key}": value for p, state in self.optimizer.state.items()
                           for key, value in state.items() if key != "step"})
        state = {"step": self.step, "totals": self.totals, "adaptive": self.adaptive, "inputs": self.inputs,
                 "config": asdict(self.config)}
        if rank() == 0:
            try:
                shutil.rmtree(temporary, ignore_errors=True)
                self.student.save_pretrained(temporary, weights=weights)
                self.tokenizer.save(temporary, self.stop_ids)
                save_file(moments, temporary / "optimizer.safetensors")
                (temporary / "state.json").write_text(json.dumps(state, indent=1))
                for file in temporary.iterdir():  # on the disk before the name says so
                    shutil.copymode(temporary / "state.json", file)  # safetensors files come without the umask's mode
                    with open(file, "rb") as handle:
                        os.fsync(handle.fileno())
                if final.exists():
                    remove(final)
                os.replace(temporary, final)
                if os.name == "posix":
                    folder = os.open(self.out, os.O_RDONLY)
                    os.fsync(folder)
                    os.close(folder)
                for old in checkpoints(self.out)[:-KEEP]:
                    remove(old)
            except (OSError, SafetensorError) as error:
                shutil.rmtree(temporary, ignore_errors=True)
                size = sum(x.nbytes for x in (*weights.values(), *moments.values()))
                raise InputError(
                    f"step {self.step} could not be saved in {self.out} ({error}): it takes {size / 1e9:.3g} GB, and "
                    f"{shutil.disk_usage(self.out).free / 1e9:.3g} GB are free. The last complete checkpoint is "
                    f"{self.saved or 'none'}; free some and go on with --resume") from None
        gather(None)
        self.saved = final

    def load(self, folder: Path) -> None:
        before, file = read_state(folder, self.config), folder / "optimizer.safetensors"
        was = before["inputs"] if isinstance(before.get("inputs"), dict) else {}
        for name, now in self.inputs.items():
            if was.get(name, now) != now:
                raise InputError(f"--resume of {self.out}: the {name} has changed since the run began, so it would not "
                                 "be the same run: put it back, or start another run")
        self.step, self.totals, self.adaptive = before["step"], before["totals"], before["adaptive"]
        try:
            moments = load_file(file)
            for name, p in self.student.named_parameters():
                state = {key: moments[f"{name}.{key}"] for key in ("exp_avg", "exp_avg_sq")}
                if any(x.shape != p.shape or x.dtype != p.dtype or not x.isfinite().all() for x in state.values()):
                    raise ValueError(f"{name} has another shape or dtype, or is not finite")  # fused AdamW trusts it
                state = {key: like(x, p) for key, x in state.items()}
                state["step"] = torch.tensor(float(self.step), device=p.device)  # as fused AdamW keeps it
                self.optimizer.state[p] = state
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise InputError(f"{file}: not a complete optimizer state ({error}). Delete {folder} to resume from the "
                             "checkpoint before it") from None

    def summarize(self, whole: float | None) -> None:
        """Print a run's last block from its log: what was learned and what it cost. whole: FLOP of the same steps on
        whole responses, where known."""
        records = self.records()
        steps, evals = [r for r in records if "loss" in r], [r for r in records if "eval" in r]
        first, final = steps[0], steps[-1]
        note = " (interrupted; go on with --resume)" if self.interrupted else ""
        print(f"\nafter {final['step']} steps{note}: loss {first['loss']:.4f} -> {final['loss']:.4f}")
        for r in evals:
            if r["eval"] == "teacher":
                print(f"  teacher, greedy accuracy:   {r['accuracy']:.3f}, mean length {r['mean_len']:.0f}")
        for kind in ("greedy", "sampled", "kl"):
            mine = [r for r in evals if r["eval"] == "student" and r["kind"] == kind]
            if not mine or mine[-1]["step"] != final["step"]:
                continue
            key, last = "kl" if kind == "kl" else "accuracy", mine[-1]
            change = (f"{mine[0][key]:.3f} -> " if mine[0]["step"] == 0 else "") + f"{last[key]:.3f}"
            print(f"  student, held-out KL:       {change} nats a token, over whole responses of "
                  f"{last['response_len']:.0f} tokens" if kind == "kl" else
                  f"  student, {kind + ' accuracy:':18} {change} (95%: {last['low']:.3f} to {last['high']:.3f}), "
                  f"P(finish) {last['finish']:.3f}, mean length {last['mean_len']:.0f}")
        total = {part: sum(r[f"seconds_{part}"] for r in steps) for part in ("sample", "learn")}
        flop, cut = final["total_flop"], sum(1 - r["finish"] for r in steps) / len(steps)
        print(f"  seconds: sampling {total['sample']:.1f}, scoring and learning {total['learn']:.1f}, evaluations "
              f"{sum(r['seconds'] for r in evals):.1f}\n  {final['total_tokens_trained']:,} tokens trained on, "
              f"{flop / 1e12:.3g} TFLOP, {flop / final['total_seconds'] / 1e9:.1f} GFLOP/s")
        if whole is not None and not cut:
            print("  the prefix cut none of the responses: this was plain on-policy distillation")
        elif whole is not None:
            print(f"  the prefix cut {cut:.0%} of the responses; on whole ones the same steps would have cost about "
                  f"{whole / 1e12:.3g} TFLOP, {whole / flop:.1f} times as much")
        print(f"  checkpoint {self.saved}\n  talk to it: python sample.py --model {self.saved} --data "
              f"{self.config.eval_data or self.config.data}\n  log {self.log}")
