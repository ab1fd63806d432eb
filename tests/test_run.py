"""A run's folder: nothing of others is destroyed in it, nothing of ours is lost."""

import contextlib
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import data.run
import train
from data import HERE, InputError
from data.run import checkpoints, read_log
from tests.test_train import BLIND, TINY, run

ROOT = Path(train.__file__).parent


def write(file: Path, text: str = "{}") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)])
def test_what_is_not_a_runs_is_never_touched(tmp_path, overwrite):
    model = tmp_path / "model"
    for name in ("config.json", "model.safetensors"):
        write(model / name, "mine")
    before = {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()}
    for out, why in ((model, "none of a run's: choose another"), (tmp_path, "is, holds or lies in --student"),
                     (model / "inside", "is, holds or lies in --student")):
        with pytest.raises(InputError, match=why):
            run(*TINY, *BLIND, "--out_dir", out, "--student", model, *overwrite)
    write(tmp_path / "project/config.json", "a project's")
    with pytest.raises(InputError, match="holds a model or a config.json that is none of a run's"):
        run(*TINY, *BLIND, "--out_dir", tmp_path / "project", *overwrite)
    assert {f: f.read_bytes() for f in model.rglob("*")} == {f: x for f, x in before.items() if model in f.parents}
    assert [f.name for f in (tmp_path / "project").iterdir()] == ["config.json"]


@pytest.mark.parametrize("out", ["file/out", "x" * 300, "link"])
def test_a_folder_that_cannot_be_written_to_is_told_before_models_are_loaded(tmp_path, out, monkeypatch):
    write(tmp_path / "file")
    (tmp_path / "link").symlink_to(tmp_path / "link")
    monkeypatch.setattr(train, "load_pair", lambda *_: pytest.fail("loaded"))
    with pytest.raises(InputError, match="--out_dir .*: cannot be written to"):
        run(*TINY, *BLIND, "--out_dir", tmp_path / out)


def test_space_is_counted_before_the_first_step(tmp_path, monkeypatch):
    enough = 3 * 12 * 547_936  # three checkpoints of 12 bytes a parameter
    for free in (enough, enough - 1):
        monkeypatch.setattr(data.run.shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        refused = pytest.raises(InputError, match=r"checkpoints will take 0\.0 GB there and 0\.0 GB are free; free")
        with refused if free < enough else contextlib.nullcontext():
            run(*TINY, *BLIND, "--steps", "1", "--out_dir", tmp_path / str(free))


def test_a_save_that_fails_says_why_and_keeps_the_last(tmp_path, monkeypatch):
    save_file = data.run.save_file

    def full(weights, file):
        if "step_000002" in str(file):
            raise OSError(28, "No space left on device")
        save_file(weights, file)

    monkeypatch.setattr(data.run, "save_file", full)
    with pytest.raises(InputError, match=r"step 2 could not be saved .*No space left.* "
                                         "The last complete checkpoint is .*step_000001; mend that and go on"):
        run(*TINY, *BLIND, "--save_every", "1", "--out_dir", tmp_path)
    assert [f.name for f in tmp_path.iterdir() if "step" in f.name] == ["step_000001"]


def test_two_runs_in_one_folder(tmp_path):
    command = [sys.executable, "train.py", *TINY, *BLIND, "--steps", "300", "--out_dir", tmp_path]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as first:
        while not (tmp_path / "log.jsonl").exists():
            assert first.poll() is None
            time.sleep(0.05)
        with pytest.raises(InputError, match="another run is at work there; wait"):
            run(*TINY, *BLIND, "--out_dir", tmp_path, "--overwrite")
        first.send_signal(signal.SIGTERM)  # finishes its step, and saves
    assert first.returncode == 0
    saved, log = checkpoints(tmp_path), read_log(tmp_path / "log.jsonl")
    assert len(saved) == 1 and int(saved[0].name[5:]) == log[-1]["step"] < 300


def test_a_file_system_without_locks_is_no_other_run(tmp_path, monkeypatch, capsys):
    def none(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(data.run.fcntl, "flock", none)
    run(*TINY, *BLIND, "--steps", "1", "--out_dir", tmp_path)
    assert "its file system has no locks" in capsys.readouterr().out and checkpoints(tmp_path)


def test_a_student_whose_folder_goes_away_keeps_its_tokenizer(tmp_path, monkeypatch):
    student, log_step = shutil.copytree(HERE / "chains/student", tmp_path / "student"), train.log_step
    monkeypatch.setattr(train, "log_step", lambda *args: (log_step(*args), shutil.rmtree(student, True)))
    run(*TINY, *BLIND, "--student", student, "--out_dir", tmp_path / "out")
    kept, (saved,) = HERE / "chains/student/tokenizer.json", checkpoints(tmp_path / "out")
    assert not student.exists() and (saved / "tokenizer.json").read_bytes() == kept.read_bytes()


def test_other_data_or_another_teacher_is_no_resumption(tmp_path):
    rows = write(tmp_path / "rows.jsonl", (HERE / "chains/train.jsonl").read_text())
    teacher = tmp_path / "teacher"
    subprocess.run(["cp", "-r", HERE / "chains/teacher", teacher], check=True)
    out = tmp_path / "out"
    run(*TINY, *BLIND, "--data", rows, "--teacher", teacher, "--student", HERE / "chains/student", "--out_dir", out)
    whole = rows.read_text()
    rows.write_text(whole[: len(whole) // 2].rpartition("\n")[0] + "\n")
    with pytest.raises(InputError, match="changed since the run began: file of --data"):
        run("--resume", "--steps", "4", "--out_dir", out)
    rows.write_text(whole)
    weights = bytearray((teacher / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (teacher / "model.safetensors").write_bytes(weights)
    with pytest.raises(InputError, match="changed since the run began: teacher's weights"):
        run("--resume", "--steps", "4", "--out_dir", out)


def test_what_a_kill_leaves_is_cleared(tmp_path):
    run(*TINY, *BLIND, "--out_dir", tmp_path)
    write(tmp_path / ".step_000002.incomplete/model.safetensors")
    run("--resume", "--out_dir", tmp_path)
    assert sorted(f.name for f in tmp_path.iterdir()) == [".train.lock", "config.json", "log.jsonl", "step_000003"]


def test_files_get_the_umasks_mode(tmp_path):
    before = os.umask(0o027)
    try:
        run(*TINY, *BLIND, "--out_dir", tmp_path)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(f.stat().st_mode) for f in (tmp_path / "step_000003").iterdir()} == {0o640}


def test_the_log_is_json_to_any_parser(tmp_path):
    run(*TINY, "--eval_kl", "0", "--max_new_tokens", "3", "--out_dir", tmp_path)  # no response ends

    def refuse(word):
        raise AssertionError(word)

    found = [json.loads(line, parse_constant=refuse) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert any(r.get("accuracy_given_finish", 0) is None for r in found)


def test_a_log_of_anything_does_not_stop_a_resumption(tmp_path):
    run(*TINY, *BLIND, "--save_every", "2", "--out_dir", tmp_path)
    for junk in (b"\xff\xfe", b"5\n", b"[" * 100_000):
        (tmp_path / "log.jsonl").write_bytes(junk)
        subprocess.run(["rm", "-r", tmp_path / "step_000003"], check=True)
        run("--resume", "--out_dir", tmp_path)


def test_a_run_that_ended_in_its_first_evaluation_is_simply_started_again(tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as m, pytest.raises(InputError, match="step 0: out of memory in evaluation; nothing was "
                                                   "saved. Lower --eval_batch_size"):
        m.setattr(train, "examine", full)
        run(*TINY, "--out_dir", tmp_path)
    assert sorted(f.name for f in tmp_path.iterdir()) == [".train.lock", "config.json"]
    run(*TINY, *BLIND, "--out_dir", tmp_path)
    assert checkpoints(tmp_path)
