"""Files that nobody would write on purpose: every command ends well, or with one clear line and status 2.

Values inside the JSON files of a checkpoint, a run and a data set are replaced, the files cut, and the templates loop;
`hypothesis` chooses where and by what, the same at every run.
"""

import contextlib
import io
import json
import os
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import eval as evaluation
import sample
import train
from data import HERE, InputError, load_jsonl, run_command
from data.flags import parse_flags
from data.tokenizer import Tokenizer, check_same
from model import count_parameters, load_config
from sample import Decoder

STUDENT = HERE / "chains/student"
CONFIGS = ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json")
PATIENCE = 20  # seconds a command may take on a busy machine; those here take a tenth of one

# What stands in the place of a value, or (bytes) of a whole file or of the rest of it
VALUES = [
    None, True, False, -1, 0, 1, 2, 3, 7, 0.5, -0.5, 1e200, float("nan"), float("inf"), 10**5, 10**9, 2**31, 2**63,
    -(2**70), 10**400, "", "x", "two", "²", "NFC", "((((", "(?:a|a)*(?!.)b|.", "(?:a{1000}){1000}", "\ud800", "llama",
    "gpt2", "\0", [], [1], [None], ["x"], [[2]], [2, "x"], [-3], {}, {"a": 1}, {"content": ["a"]}, {"type": "evil"},
    {"type": "WordPiece"}, {"rope_type": ["yarn"], "rope_theta": 1}, {"AutoConfig": "evil.Evil"},
    {"rope_type": "yarn", "rope_theta": 1, "factor": 0}, {"rope_type": "linear", "rope_theta": 9.0, "factor": -2},
]
BYTES = [
    b"", b"[" * 100_000, b'{"a":' * 100_000, b"\xff\xfe", b"\x00", b"null", b"5", b"NaN", b"[]", b"{}", b'"x"', b"{",
    b'{"x": ' + b"9" * 6000 + b"}", b"\xef\xbb\xbf{}",
]


@st.composite
def changes(draw, files):
    """(file, path of keys into its JSON, what to put there), or (file, share to keep of it, bytes to add)."""
    name = draw(st.sampled_from(files))
    if draw(st.integers(0, 4)) == 0:
        return name, draw(st.sampled_from([0.0, 0.0, 0.3, 0.9, 1.0])), draw(st.sampled_from(BYTES))
    value = draw(st.sampled_from(VALUES) | st.integers(-3, 3000) | st.recursive(
        st.none() | st.integers() | st.floats() | st.text(max_size=3), lambda x: st.lists(x, max_size=2), max_leaves=4))
    return name, draw(st.lists(st.integers(0, 60), min_size=1, max_size=6)), value


def spoil(folder: Path, change) -> None:
    """Change a file. Each number of the path picks a key or an item, until there is nothing below."""
    name, where, what = change
    data = (folder / name).read_bytes()
    if isinstance(where, float):
        data = data[: int(where * len(data))] + what
    else:
        lines = data.decode().splitlines() if name.endswith(".jsonl") else [data.decode()]
        at = where[0] % len(lines)
        top = inner = json.loads(lines[at])
        for n, i in enumerate(where):
            keys = list(inner) if isinstance(inner, dict) else range(len(inner))
            key = keys[i % len(keys)]
            if n == len(where) - 1 or not isinstance(inner[key], (dict, list)) or not inner[key]:
                inner[key] = what
                break
            inner = inner[key]
        lines[at] = json.dumps(top)
        data = "\n".join(lines).encode()
    (folder / name).unlink()  # it may be a link
    (folder / name).write_bytes(data)


def copy(folder: Path, to: Path) -> Path:
    """A copy of a folder whose files are links, except those that `spoil` replaces."""
    shutil.rmtree(to, ignore_errors=True)
    return shutil.copytree(folder, to, copy_function=os.link)


def ends_well(main, config, about="") -> bool:
    """Whether a command succeeds; if not, it must say so in one line and end with status 2."""
    said, start = io.StringIO(), time.perf_counter()
    with contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO(), "utf-8")), contextlib.redirect_stderr(said):
        try:
            run_command(main, config)
            status = 0
        except SystemExit as end:
            status = end.code
    assert time.perf_counter() - start < PATIENCE, about
    errors = [line for line in said.getvalue().split("\n") if ": error: " in line]
    assert (status, len(errors)) in ((0, 0), (2, 1)), (about, said.getvalue())
    assert not errors or said.getvalue().endswith(errors[0] + "\n"), said.getvalue()
    return status == 0


def many(examples: int):
    return settings(max_examples=examples, derandomize=True, deadline=None, database=None,
                    suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("hostile")


# --- a checkpoint


def load(folder: Path) -> None:
    """What every command does with a checkpoint, and --plan."""
    tokenizer = Tokenizer(folder)
    tokenizer.decode(tokenizer.encode_prompt("Dan=Eve-8\nEve=14\nDan?\n" + "a" * 40) + list(tokenizer.stop_ids))
    count_parameters(load_config(folder))
    check_same(tokenizer, Tokenizer(STUDENT))
    Decoder.from_pretrained(folder, "cpu", torch.float32, tokenizer.vocab_size)


@many(400)
@given(change=changes(CONFIGS))
def test_a_checkpoint_loads_or_is_refused_in_one_line(place, change):
    folder = copy(STUDENT, place / "student")
    spoil(folder, change)
    ends_well(load, folder, change)


TOKENIZER, SPLIT = "tokenizer.json", "pre_tokenizer.pretokenizers.0.pattern.Regex"
FAULTS = [  # (file, key, values that once ended in a traceback or not at all)
    ("config.json", "num_hidden_layers", [10**9, 10**5, True, 0]), ("config.json", "hidden_size", [-96, 1e200]),
    ("config.json", "vocab_size", [-5]), ("config.json", "num_key_value_heads", [-2, 3]),
    ("config.json", "head_dim", [-32, 31]), ("config.json", "intermediate_size", [-3]),
    ("config.json", "rope_parameters.rope_type", [["yarn"]]), ("config.json", "rms_norm_eps", [-1.0, float("nan")]),
    ("config.json", "rope_parameters.rope_theta", [0, -1e4, True, float("inf")]), ("config.json", "dtype", ["x"]),
    ("config.json", "eos_token_id", ["two", [[2]], -3]), ("config.json", "model_type", ["evil", ["llama"]]),
    ("config.json", "save_pretrained", [5]),
    ("generation_config.json", "eos_token_id", [{"a": 1}, "x", [2, "x"], [None]]),
    ("tokenizer_config.json", "eos_token", [["a"], {"content": ["a"]}]),
    ("tokenizer_config.json", "chat_template", [5]), (TOKENIZER, "normalizer", [[1], "NFC"]),
    (TOKENIZER, "model.vocab.!", ["0", -1, 10**12, 0.0]), (TOKENIZER, "added_tokens.0.id", [-1, "7", [7]]),
    (TOKENIZER, SPLIT, ["((((", None, 5, "(?:a{1000}){1000}", "(?:a|a)*(?!.)b|."]),
    (TOKENIZER, "pre_tokenizer", [[1], {"type": "Sequence", "pretokenizers": []}]),
    (TOKENIZER, "model.type", ["WordPiece", "evil"]),
]


@pytest.mark.parametrize("name, key, value", [(name, key, x) for name, key, values in FAULTS for x in values])
def test_each_fault_that_was_once_found_is_refused_in_one_line(place, name, key, value):
    folder = copy(STUDENT, place / "student")
    top = inner = json.loads((folder / name).read_text())
    *path, last = key.split(".")
    for k in path:
        inner = inner[int(k) if isinstance(inner, list) else k]
    inner[last] = value
    top.pop("layer_types", None)
    (folder / name).unlink()
    (folder / name).write_text(json.dumps(top))
    assert not ends_well(load, folder)


WEIGHTS = [b"", b"\xff" * 100, b"\x08" + b"\0" * 7 + b"{}      ", (2**62).to_bytes(8, "little"), b"PK\x03\x04"]
INDEXES = [{"weight_map": w} for w in ([1, 2], None, {"a": 5}, {"a": "\0"}, {"a": "x\ny"}, {"a": "../config.json"},
                                       {"a": "/etc/passwd"}, {"a": ""}, {})]


@pytest.mark.parametrize("name, what", [("model.safetensors", x) for x in WEIGHTS]
                         + [("model.safetensors.index.json", json.dumps(x).encode()) for x in INDEXES])
def test_weights_that_are_none_are_refused_in_one_line(place, name, what):
    folder = copy(STUDENT, place / "student")
    (folder / name).unlink(missing_ok=True)
    (folder / name).write_bytes(what)
    assert not ends_well(load, folder)


@pytest.mark.parametrize("name, kind", [("config.json", "evil"), ("config.json", "qwen3"),
                                        ("tokenizer_config.json", "")])
def test_nothing_that_a_checkpoint_names_is_executed(place, name, kind, monkeypatch):
    """Not even where standard input says yes to transformers' question."""
    folder = copy(STUDENT, place / "student")
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")  # so that transformers loads the tokenizer
    (folder / "evil.py").write_text(f"open({str(place / 'executed')!r}, 'w')\nclass Evil: pass\n")
    change = {"model_type": kind, "tokenizer_class": "Evil",
              "auto_map": {"AutoConfig": "evil.Evil", "AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    before = json.loads((folder / name).read_text())
    (folder / name).unlink()
    (folder / name).write_text(json.dumps(before | change))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    ends_well(load, folder)
    assert not (place / "executed").exists()


# --- chat templates


@pytest.mark.parametrize("template, message", [
    ("{{ 1/0 }}", "ZeroDivisionError"), ("{{ 'a'+5 }}", "TypeError"), ("{{ strftime_now(5) }}", "TypeError"),
    ("{{ raise_exception() }}", "TypeError"), ("{% include 'x' %}", "TypeError"), ("{{ range(10**12) }}", "Overflow"),
    ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"), ("{% if 1 %}" * 3000, "Error"),
    ("{{ " + "(" * 3000, "Error"), ("{{ 'a' * 10**11 }}", "MemoryError"), ("{{ 'a' * 10**7 }}", "more than 1,000,000"),
    ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "more than 2 s"),
    ("{{ 9**(9**(9**9)) }}", "more than 2 s"), ("{{ ''.__class__.__mro__ }}", "SecurityError"),
    ("{{ messages[0].content[:1] }}", "does not contain the user's message as it is"),
    ("{{ messages[0].content | upper }}", "does not contain the user's message as it is"), (b"\xff", "not UTF-8 text"),
    ("{{ messages[0].content }}", ""),
])
def test_a_template_that_fails_or_never_ends_is_one_line(place, template, message):
    folder = copy(STUDENT, place / "student")
    (folder / "chat_template.jinja").write_bytes(template if isinstance(template, bytes) else template.encode())
    try:
        ids = Tokenizer(folder).encode_prompt("Dan?")
        assert not message and ids == Tokenizer(STUDENT).encode("Dan?")
    except InputError as error:
        assert message and message in str(error)


# --- whole commands


@pytest.fixture(scope="module")
def made(place):
    """A run of one step, to resume, and an evaluation that was interrupted, both on a file of two problems."""
    rows = load_jsonl(HERE / "chains/test.jsonl")[:2]
    (place / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert command(place, "train", STUDENT, place / "run") and command(place, "eval", STUDENT, place / "kept")
    return place


def command(place: Path, name: str, student: Path, out: Path, *flags) -> bool:
    """Run a command with the smallest settings; whether it succeeded."""
    small = {
        "sample": "--model STUDENT --data DATA --max_new_tokens 2",
        "eval": "--model STUDENT --data DATA --num_problems 1 --max_new_tokens 2 --out OUT/out.json",
        "train": "--student STUDENT --teacher TEACHER --data DATA --eval_data DATA --out_dir OUT --steps 1 "
                 "--lr_schedule constant --batch_size 1 --prefix_len 2 --eval_problems 1 --eval_kl 1 "
                 "--max_new_tokens 2",
    }[name]
    words = {"STUDENT": student, "TEACHER": STUDENT, "DATA": place / "data.jsonl", "OUT": out}
    for word, path in words.items():
        small = small.replace(word, str(path))
    out.mkdir(exist_ok=True)
    module = {"sample": sample, "eval": evaluation, "train": train}[name]
    main = module.train if name == "train" else module.main
    return ends_well(main, parse_flags(module.Config, "", [*small.split(), *flags]), (name, flags))


@many(60)
@given(change=changes(CONFIGS), name=st.sampled_from(["sample", "eval", "train", "plan"]))
def test_commands_with_a_spoilt_checkpoint(made, change, name):
    folder = copy(STUDENT, made / "student")
    spoil(folder, change)
    shutil.rmtree(made / "out", ignore_errors=True)
    command(made, *(("train", folder, made / "out", "--plan") if name == "plan" else (name, folder, made / "out")))


@many(60)
@given(change=changes(["data.jsonl"]), name=st.sampled_from(["sample", "eval", "train"]))
def test_commands_with_spoilt_data(made, change, name):
    whole = (made / "data.jsonl").read_bytes()
    spoil(made, change)
    shutil.rmtree(made / "out", ignore_errors=True)
    try:
        command(made, name, STUDENT, made / "out")
    finally:
        (made / "data.jsonl").write_bytes(whole)


def of_a_run(name: str) -> str:
    return name if name == "log.jsonl" else f"step_000001/{name}"


@many(40)
@given(change=changes([name for name in ("state.json", "log.jsonl", *CONFIGS)]))
def test_a_spoilt_run_is_resumed_or_refused(made, change):
    folder = copy(made / "run", made / "again")
    spoil(folder, (of_a_run(change[0]), *change[1:]))
    command(made, "train", STUDENT, folder, "--resume", "--steps", "2")


@many(20)
@given(change=changes(["state.json"]))
def test_a_spoilt_checkpoint_of_a_run_is_talked_to(made, change):
    folder = copy(made / "run", made / "again")
    spoil(folder / "step_000001", change)
    command(made, "sample", folder / "step_000001", made / "out")


@many(40)
@given(change=changes(["out.jsonl"]))
def test_spoilt_kept_responses_are_used_or_refused(made, change):
    folder = copy(made / "kept", made / "again")
    spoil(folder, change)
    command(made, "eval", STUDENT, folder)


@pytest.mark.parametrize("name, flags", [
    ("train", "--seed 18446744073709551616"), ("sample", "--seed 9223372036854775808"),
    ("eval", "--seed 1" + "0" * 30), ("train", "--prefix_len 1" + "0" * 38), ("train", "--lr 1e300"),
    ("sample", "--stop_tokens ²"), ("sample", "--stop_tokens 1" + "0" * 5000),
    ("sample", "--model " + "x" * 5000),
])
def test_numbers_that_torch_cannot_hold_are_one_line(made, name, flags):
    shutil.rmtree(made / "out", ignore_errors=True)
    assert not command(made, name, STUDENT, made / "out", *flags.split())


def test_half_a_surrogate_pair_is_printed_as_its_number(made):
    assert command(made, "sample", STUDENT, made / "out", "--prompt", "Dan \ud800?\n")
