"""A run's folder: config.json, log.jsonl, and checkpoints `step_NNNNNN/` that are whole or not there at all.

A checkpoint is the student as a Hugging Face folder, the optimizer's moments, and a JSON state. Randomness and the data
order are functions of (seed, step), so nothing else is needed to go on bit for bit (on one machine). `config` is
train.py's Config throughout.
"""

import json
import os
import re
import shutil
import signal
import zlib
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from data import InputError, parse_object, read_json, reading
from data.checkpoint import weight_files
from data.ranks import all_gather, collect, like, rank, world_size
from data.tokenizer import resume_clock

try:
    import fcntl
except ImportError:  # Windows: no lock there
    fcntl = None

KEEP = 2  # checkpoints of a run that stay
LOCK = ".train.lock"
# Flags that may change between a run and its resumption. Those from `device` on change the last bits at most.
MAY_CHANGE = {"steps", "eval_every", "save_every", "resume", "overwrite", "out_dir", "plan", "world",
              "device", "teacher_device", "micro_tokens", "eval_batch_size", "recompute", "compile", "shard",
              "shard_teacher"}


def restore_flags(config) -> Path:
    """The checkpoint to resume from. Flags of `config` that were not typed get the run's values; InputError if a typed
    one differs and is not in MAY_CHANGE, or if --steps differs and sets the pace of a schedule."""
    out, found = Path(config.out_dir), checkpoints(Path(config.out_dir))
    if config.overwrite:
        raise InputError("--resume and --overwrite contradict each other")
    if not found:
        raise InputError(f"--resume: no complete checkpoint in --out_dir {out}")
    state, barred = read_state(found[-1]), []
    resume_clock(state)
    before = state["config"]
    for name, now in asdict(config).items():
        if name in ("resume", "overwrite", "out_dir", "plan", "world") or name not in before:
            continue
        was = before[name]
        if name not in config.typed:
            setattr(config, name, was)
        elif now != was and name in MAY_CHANGE:
            print(f"resuming: --{name} is {now!r} and was {was!r}")
        elif now != was:
            barred.append(f"--{name} is {now!r} and was {was!r}")
    if barred:
        raise InputError(f"--resume of {out}: {'; '.join(barred)}. Only these may change: "
                         + ", ".join(f"--{name}" for name in asdict(config) if name in MAY_CHANGE)
                         + " (--steps only where no schedule is paced by it)")
    for name, paced in (("schedule", ("linear",)), ("lr_schedule", ("cosine",))):
        if config.steps != before["steps"] and getattr(config, name) in paced:
            raise InputError(f"--resume: --steps cannot change: --steps {before['steps']} set the pace of --{name} "
                             f"{getattr(config, name)}")
    return found[-1]


def read_state(folder: Path) -> dict:
    """A checkpoint's state.json."""
    with reading(folder / "state.json"):
        state = read_json(folder / "state.json")
        if folder.name != f"step_{state['step']:06d}":
            raise ValueError(f"its step is {state['step']}")
        return {key: state[key] for key in ("step", "adaptive", "inputs", "config")}


@contextmanager
def claim(config):
    """Lock --out_dir for the length of the block. Raises InputError where it cannot be written to, another run is at
    work there, or a fresh run would spoil an earlier one (without --overwrite), a model or another's config.json."""
    out = Path(config.out_dir)
    try:
        if not config.resume:
            protect(config, out)
        all_gather(None)  # all ranks have seen the folder as it was
        if rank() == 0:
            out.mkdir(parents=True, exist_ok=True)
            lock = open(out / LOCK, "a")  # noqa: SIM115
    except OSError as error:
        raise InputError(f"--out_dir {out}: cannot be written to ({error.strerror}); choose another") from None
    if rank():
        yield
        return
    with lock:
        try:
            if fcntl is not None:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"--out_dir {out}: another run is at work there; wait, or choose another") from None
        except OSError:
            print(f"--out_dir {out}: its file system has no locks, so see that no other run writes there")
        try:
            yield
        finally:
            if [f.name for f in out.iterdir()] == [LOCK]:  # nothing came of it
                shutil.rmtree(out, ignore_errors=True)


def protect(config, out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise InputError(f"--out_dir {out} is a file, expected a folder")
    saved, here = checkpoints(out), Path(os.path.realpath(out))
    ours = saved or (out / "log.jsonl").is_file()
    foreign = (out / "config.json").exists() and not ours and not (out / LOCK).is_file()
    if foreign or (out / "model.safetensors").exists():
        raise InputError(f"--out_dir {out} holds a model or a config.json that is none of a run's: choose another")
    for name in ("student", "teacher"):
        used = Path(os.path.realpath(getattr(config, name) or "-"))
        if used.is_dir() and (used == here or here in used.parents or used in here.parents):
            raise InputError(f"--out_dir {out} is, holds or lies in --{name} {getattr(config, name)}: choose another")
    if ours and not config.overwrite:
        go_on = "if it was interrupted, continue it with --resume; " if saved else ""
        raise InputError(f"--out_dir {out} already holds a run; {go_on}discard it with --overwrite or choose another")


def checkpoints(out: Path) -> list[Path]:
    """Complete checkpoints, the oldest first. Other folders are none of ours, whatever they are called."""
    found = [f for f in out.glob("step_*") if re.fullmatch(r"step_\d{6,}", f.name) and (f / "state.json").is_file()]
    return sorted(found, key=lambda f: int(f.name.removeprefix("step_")))


def remove(folder: Path) -> None:
    """Delete a checkpoint: renamed first, so that a kill leaves no half of one. What is left is cleared when the run is
    opened again."""
    gone = folder.with_name(f".{folder.name}.old.incomplete")
    os.replace(folder, gone)
    shutil.rmtree(gone, ignore_errors=True)


def read_log(log: Path) -> list[dict]:
    """The records of a .jsonl file up to the first line that is torn (by a kill) or no JSON object."""
    records = []
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            records.append(parse_object(line, log))
        except InputError:
            break
    return records


def fingerprint(folder: Path) -> list[list]:
    """Identifies a checkpoint's weights: name, size and a checksum of the last megabyte of each file."""
    found: list[list] = []
    for file in weight_files(folder):
        with open(file, "rb") as handle:
            handle.seek(max(0, file.stat().st_size - 2**20))
            found.append([file.name, file.stat().st_size, zlib.crc32(handle.read())])
    return found


class Run:
    """The state of a run beside its models: `step` (steps made), `stage` ("sampling", "learning", "saving" or
    "evaluation", for messages and for what a failure may save), `adaptive` (state of an adaptive prefix),
    `interrupted` (by a signal), `saved` (its last checkpoint), and its folder. Rank 0 writes, all ranks read."""

    def __init__(self, config, pair, optimizer, resume_from: Path | None, inputs: dict):
        """inputs: by name, what must be the same when the run is resumed, as checksums or short descriptions."""
        self.config, self.student, self.tokenizer, self.stop_ids = config, pair.student, pair.tokenizer, pair.stop_ids
        self.optimizer, self.out, self.saved, self.inputs = optimizer, Path(config.out_dir), resume_from, inputs
        self.log, self.step, self.stage, self.interrupted = self.out / "log.jsonl", 0, "", False
        self.adaptive = {"prefix_len": config.prefix_start, "smooth": None}
        if resume_from is not None:
            self.load(resume_from)
        if rank() == 0:
            for torn in self.out.glob(".step_*.incomplete"):  # left by a kill
                shutil.rmtree(torn, ignore_errors=True)
            if resume_from is None:
                for old in checkpoints(self.out):
                    remove(old)
                self.log.unlink(missing_ok=True)
            elif self.log.is_file():  # records after the checkpoint will be written again; a torn last line goes
                temporary = self.log.with_name("log.jsonl.incomplete")
                with reading(self.log):
                    kept = [r for r in read_log(self.log) if r["step"] <= self.step]
                temporary.write_text("".join(json.dumps(r) + "\n" for r in kept), encoding="utf-8")
                os.replace(temporary, self.log)
            (self.out / "config.json").write_text(json.dumps(asdict(config), indent=1) + "\n")
            # 12 bytes a parameter: float32 weights and AdamW's two moments
            need = 12 * sum(p.numel() for p in self.student.parameters()) * (KEEP + 1 - len(checkpoints(self.out)))
            if (free := shutil.disk_usage(self.out).free) < need:
                raise InputError(f"--out_dir {self.out}: checkpoints will take {need / 1e9:.1f} GB there and "
                                 f"{free / 1e9:.1f} GB are free; free some or choose another")
        all_gather(None)

    def interrupt(self, number: int, _frame) -> None:
        """What Ctrl-C, SIGTERM or a closed terminal does during the loop. A second Ctrl-C or SIGTERM ends the process;
        SIGHUP may come twice, since a terminal that closes sends two."""
        self.interrupted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if number == signal.SIGINT and world_size() == 1:
            with suppress(OSError):  # not by print, which the signal may have interrupted
                os.write(2, b"\nending after this step or evaluation; Ctrl-C again ends at once\n")

    def stopping(self) -> bool:
        """Whether any rank was interrupted; all ask together."""
        stop = any(all_gather(self.interrupted))
        self.interrupted = self.interrupted or stop
        return stop

    def write(self, record: dict) -> None:
        if rank() == 0:
            with open(self.log, "a", encoding="utf-8") as file:
                file.write(json.dumps(record, allow_nan=False) + "\n")

    def records(self) -> list[dict]:
        """The log as rank 0 sees it, on every rank."""
        return all_gather(read_log(self.log) if rank() == 0 and self.log.is_file() else [])[0]

    @property
    def checkpoint(self) -> Path:
        """Where the run's state after this step belongs."""
        return self.out / f"step_{self.step:06d}"

    def save(self) -> None:
        """Write out_dir/step_NNNNNN: a Hugging Face folder plus what resuming needs. It appears whole or not at all.
        All ranks call it, since a sharded student is collected from all; rank 0 writes, and the others wait for it."""
        final, temporary = self.checkpoint, self.checkpoint.with_name(f".{self.checkpoint.name}.incomplete")
        names = {p: name for name, p in self.student.named_parameters()}
        weights = collect({name: p for p, name in names.items()})
        moments = collect({f"{names[p]}.{key}": value for p, state in self.optimizer.state.items()
                           for key, value in state.items() if key != "step"})
        state = {"step": self.step, "adaptive": self.adaptive, "inputs": self.inputs,
                 "config": asdict(self.config)}
        if rank() == 0:
            try:
                self.student.save_pretrained(temporary, weights=weights)
                self.tokenizer.save(temporary, self.stop_ids)
                save_file(moments, temporary / "optimizer.safetensors")
                (temporary / "state.json").write_text(json.dumps(state, indent=1))
                for file in temporary.iterdir():
                    shutil.copymode(temporary / "state.json", file)  # safetensors files come without the umask's mode
                if final.exists():
                    remove(final)
                os.replace(temporary, final)
                for old in checkpoints(self.out)[:-KEEP]:
                    remove(old)
            except (OSError, SafetensorError) as error:
                shutil.rmtree(temporary, ignore_errors=True)
                raise InputError(f"step {self.step} could not be saved in {self.out} ({error}). The last complete "
                                 f"checkpoint is {self.saved or 'none'}; mend that and go on with --resume") from None
        all_gather(None)
        self.saved = final

    def load(self, folder: Path) -> None:
        before, file = read_state(folder), folder / "optimizer.safetensors"
        for name, now in self.inputs.items():
            if before["inputs"].get(name, now) != now:
                raise InputError(f"--resume of {self.out}: changed since the run began: {name}; it would not be the "
                                 "same run: put it back, or start another")
        self.step, self.adaptive = before["step"], before["adaptive"]
        with reading(file):
            moments = load_file(file)
            for name, p in self.student.named_parameters():
                state = {key: moments[f"{name}.{key}"] for key in ("exp_avg", "exp_avg_sq")}
                if any(x.shape != p.shape or x.dtype != p.dtype for x in state.values()):
                    raise ValueError(f"{name} has another shape or dtype")  # fused AdamW would trust it
                self.optimizer.state[p] = {key: like(x, p) for key, x in state.items()}
                self.optimizer.state[p]["step"] = torch.tensor(float(self.step), device=p.device)  # as AdamW does

    def summarize(self) -> None:
        """Print a run's last block from its log: what was learned and what it cost."""
        records = self.records()
        steps, evals = [r for r in records if "loss" in r], [r for r in records if "eval" in r]
        if not steps:
            print("interrupted before the first step; start again with --overwrite")
            return
        first, final, config = steps[0], steps[-1], self.config
        note = " (interrupted; go on with --resume)" if self.interrupted else ""
        print(f"\nafter {final['step']} step{'s' * (final['step'] > 1)}{note}: loss {first['loss']:.4f} -> "
              f"{final['loss']:.4f}")
        before, after = ([r for r in evals if r["step"] == step][:1] for step in (0, final["step"]))
        for key, name, form in (
                ("accuracy", "sampled accuracy", ".3f"), ("finish", "P(finish)", ".3f"),
                ("mean_len", "mean length", ",.0f"), ("kl", "KL to the teacher, nats per token", ".3f")):
            if after and key in after[0]:
                values = [format(r[key], form) for r in before + after if key in r]
                print(f"  {name + ':':35}{' -> '.join(values)}")
        seconds = {part: sum(r[f"seconds_{part}"] for r in steps) for part in ("sample", "learn")}
        flop = sum(r[f"flop_{part}"] for r in steps for part in ("sample", "teacher", "student"))
        print(f"  seconds: sampling {seconds['sample']:.1f}, scoring and learning {seconds['learn']:.1f}, evaluations "
              f"{sum(r['seconds'] for r in evals):.1f}\n  {sum(r['tokens'] for r in steps):,} tokens trained on, "
              f"{flop / 1e12:.3g} TFLOP, {flop / sum(seconds.values()) / 1e9:.1f} GFLOP/s")
        whole = [r["flop_per_whole_response"] for r in evals if "flop_per_whole_response" in r]
        if whole and evals[-1]["step"] and config.rollout == "student" and config.window == "prefix" and not config.mix:
            cut = sum(1 - r["finish"] for r in steps) / len(steps)
            whole = len(steps) * config.batch_size * sum(whole) / len(whole)
            print(f"  the prefix cut {cut:.0%} of the responses; on whole ones, as long as when evaluated, the same "
                  f"steps would have cost about {whole / 1e12:.3g} TFLOP, {whole / flop:.1f} times as much" if cut else
                  "  the prefix cut none of the responses: this was plain on-policy distillation")
        print(f"  checkpoint {self.saved}\n  talk to it: python sample.py --model {self.saved} --data "
              f"{config.eval_data or config.data}\n  log {self.log}")
