"""What is promised where files are not as they should be: nothing that they say is executed, no finished work is lost,
and a damaged file is one line that names it. Other nonsense may end as Python ends it."""

import contextlib
import io
import json
import os
import pickle
import shutil
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import eval as evaluation
import sample
import train
from data import HERE, InputError, load_jsonl, run_command
from data.flags import parse_flags
from model import Transformer

STUDENT = HERE / "chains/student"


def said(name: str, *flags) -> str:
    """The line that a command ends with; "" if it succeeds."""
    module, err = {"sample": sample, "eval": evaluation, "train": train}[name], io.StringIO()
    with contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO(), "utf-8")), contextlib.redirect_stderr(err):
        try:
            config = parse_flags(module.Config, "", [*map(str, flags)])
            run_command(module.train if name == "train" else module.main, config)
            return ""
        except SystemExit as end:
            errors = [line for line in err.getvalue().split("\n") if ": error: " in line]
            assert end.code == 2 and len(errors) == 1 and err.getvalue().endswith(errors[0] + "\n"), err.getvalue()
            return errors[0]


def train_flags(folder: Path, *flags) -> tuple:
    data = folder.parent / "data.jsonl"
    return ("train", "--student", STUDENT, "--teacher", STUDENT, "--data", data, "--out_dir", folder, "--batch_size", 1,
            "--prefix_len", 2, "--eval_every", -1, "--lr_schedule", "constant", "--steps", 1, *flags)


def copy(folder: Path, to: Path) -> Path:
    shutil.rmtree(to, ignore_errors=True)
    return shutil.copytree(folder, to)


def checkpoint_of(run: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in (run / "step_000001").iterdir()}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with two problems, and a run of one step on them."""
    place = tmp_path_factory.mktemp("hostile")
    rows = load_jsonl(HERE / "chains/test.jsonl")[:2]
    (place / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert not said(*train_flags(place / "run"))
    return place


# --- nothing is executed


@pytest.mark.parametrize("name, kind", [("config", "evil"), ("config", "qwen3"), ("tokenizer_config", "")])
def test_code_that_a_checkpoint_names_is_not_executed(place, name, kind, monkeypatch):
    """Not even where standard input says yes to transformers' question."""
    folder = copy(STUDENT, place / "student")
    (folder / "evil.py").write_text(f"open({str(place / 'executed')!r}, 'w')\nclass Evil: pass\n")
    change = {"model_type": kind, "tokenizer_class": "Evil",
              "auto_map": {"AutoConfig": "evil.Evil", "AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    file = folder / f"{name}.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    with contextlib.suppress(Exception):
        said("sample", "--model", folder, "--data", "chains", "--max_new_tokens", 1)
    assert not (place / "executed").exists()


def test_weights_that_are_pickled_are_not_read(place):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(place / "executed"),)

    folder = copy(STUDENT, place / "student")
    (folder / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "model.pt", "model.safetensors"):
        (folder / name).write_bytes(pickle.dumps(Evil()))
    with pytest.raises(InputError, match="model.safetensors"):
        Transformer.from_pretrained(folder)
    assert not (place / "executed").exists()


# --- a damaged file is one line that names it


def torn(file: Path, content: bytes | None) -> None:
    """Put `content` into a file, or cut it in two."""
    old = file.read_bytes() if file.is_file() else b'{"a": "b"}'
    file.write_bytes(old[: len(old) // 2] if content is None else content)


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe\0", b"[]", b"5"])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json",
                                  "special_tokens_map.json", "added_tokens.json", "model.safetensors"])
def test_a_damaged_file_of_a_checkpoint(place, name, content):
    folder = copy(STUDENT, place / "student")
    torn(folder / name, content)
    assert name in said("sample", "--model", folder, "--data", "chains", "--max_new_tokens", 1)


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe\0", b"{}", b"5"])
@pytest.mark.parametrize("name", ["state.json", "optimizer.safetensors", "model.safetensors"])
def test_a_damaged_file_of_a_run_is_named_and_the_rest_stays(place, name, content):
    folder = copy(place / "run", place / "again")
    torn(folder / "step_000001" / name, content)
    before = checkpoint_of(folder)
    assert name in said(*train_flags(folder, "--resume", "--steps", 2))
    assert checkpoint_of(folder) == before


# --- no work is lost


def fields(tree):
    """(what holds it, its key) of everything in a JSON value."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        yield tree, key
        if isinstance(value, (dict, list)):
            yield from fields(value)


@settings(max_examples=20, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(name=st.sampled_from(["step_000001/state.json", "step_000001/config.json", "log.jsonl"]),
       which=st.integers(0, 300), value=st.sampled_from([
           None, True, -1, 0, 3000, 0.5, float("nan"), 10**9, -(2**70), "", "\ud800", "../run", [], {}, {"a": [1]}]))
def test_an_edited_run_is_resumed_or_left_as_it_was(place, name, which, value):
    folder = copy(place / "run", place / "again")
    edited = json.loads((folder / name).read_text().split("\n" if name == "log.jsonl" else "\0")[0])
    holder, key = list(fields(edited))[which % len(list(fields(edited)))]
    assume(key != "compile")  # minutes of torch's compiler
    holder[key] = value
    (folder / name).write_text(json.dumps(edited))
    before = checkpoint_of(folder)
    with contextlib.suppress(Exception):  # whatever it ends with
        said(*train_flags(folder, "--resume", "--steps", 2))
    assert checkpoint_of(folder) == before


# --- a person's mistake is one line, before anything is done (tests/test_train.py has more)


@pytest.mark.parametrize("name, flags", [
    ("train", "--seed 18446744073709551616"), ("train", "--lr 1e300"), ("sample", "--stop_tokens ²"),
    ("sample", "--stop_tokens 1" + "0" * 5000), ("sample", "--model " + "x" * 5000),
    ("train", "--resume --out_dir nowhere --los kl"), ("train", "--resume --out_dir nowhere --loss kl"),
])
def test_a_mistake_in_a_flag_is_one_line(place, name, flags):
    assert "nowhere" not in said(name, *flags.split()) != ""


def test_half_a_surrogate_pair_is_printed_as_its_number():
    assert not said("sample", "--model", STUDENT, "--max_new_tokens", 1, "--prompt", "Dan \ud800?\n")
