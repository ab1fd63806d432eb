"""Data files, and the one error for all input that cannot be used."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).resolve().parent


class InputError(ValueError):
    """Something the user gave cannot be used. The commands print it as one line and exit with status 2."""


def out_of_memory(error: BaseException) -> bool:
    """Python, a card and a processor each say it in another way."""
    words = "out of memory", "DefaultCPUAllocator", "ALLOC_FAILED"
    return isinstance(error, MemoryError) or any(w in str(error) for w in words)


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """InputError that names `path` for whatever goes wrong while it is read: a damaged file is one line. An InputError,
    which says more, passes."""
    try:
        yield
    except (InputError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # noqa: BLE001 (panics of libraries' Rust are no Exceptions)
        wrong = "does not fit into memory" if out_of_memory(error) else "damaged, or not what it should be"
        raise InputError(f"{path}: {wrong} ({type(error).__name__}: {error})") from None


ALSO = {"math500": "math/test", "aime24": "aime/aime24", "aime25": "aime/aime25"}  # other names of test files


def resolve(name: str, split: str, flag_name: str = "data") -> Path:
    """`--data name` is data/name/{train,test}.jsonl beside this file; anything else is the path of a .jsonl file."""
    if name in ALSO:
        path = HERE / f"{ALSO[name]}.jsonl"
        if split == "train":
            raise InputError(f"--{flag_name} {name}: to test only, so not to be trained on")
    else:
        path = HERE / name / f"{split}.jsonl" if (HERE / name).is_dir() else Path(name)
    if not path.is_file():
        known = ", ".join(sorted({p.parent.name for p in HERE.glob("*/*.jsonl")}))
        maker = path.parent / "prepare.py"
        mend = f"run python data/{path.parent.name}/prepare.py first" if maker.is_file() else "give a .jsonl file"
        if others := sorted(p.name for p in path.parent.glob("*.jsonl") if (HERE / name).is_dir()):
            mend = f"it has {', '.join(others)} only: give a .jsonl file"
        raise InputError(f"--{flag_name} {name}: no file {path}; {mend}, or a data set that is there ({known})")
    return path


def embedded_model(data: str, name: str, flag_name: str) -> str:
    """The path of the teacher or student of an embedded data set, for a command that names no model."""
    folder = HERE / data / name
    if not (HERE / data).is_dir() or not folder.is_dir():
        raise InputError(f"--{flag_name}: --data {data} has no {name} of its own; name a folder or a hub model")
    return os.path.relpath(folder)


def read_text(path: str | Path, wanted: str = "") -> str:
    """A UTF-8 file. Raises InputError naming the file and what is wrong with it; `wanted` ends the message about a file
    of another kind."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error}){wanted}") from None


def parse_object(text: str, where: str | Path) -> dict:
    """The JSON object that a text is; `where` opens the message when it is none."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:  # also of numbers with thousands of digits, and of 1,000 brackets
        raise InputError(f"{where}: not JSON ({error})") from None
    if not isinstance(found, dict):
        raise InputError(f"{where}: expected an object, found {type(found).__name__}")
    return found


def read_json(path: str | Path) -> dict:
    """A JSON file that must hold an object. Raises InputError naming the file and what is wrong with it."""
    return parse_object(read_text(path), path)


def load_jsonl(path: str | Path, need: tuple[str, ...] = ("prompt", "answer")) -> list[dict]:
    """Rows of a UTF-8 JSON-lines file, each an object with the string fields `need`; blank lines are skipped. An empty
    answer is none, since no response could equal it.

    Raises InputError naming the file, the line and what is wrong there.
    """
    text, rows = read_text(path, "; a .jsonl file is wanted, and the prepare.py of a data set makes one"), []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        row = parse_object(line, f"{path}, line {number}")
        for field in need:
            if not isinstance(row.get(field), str):
                found = type(row[field]).__name__ if field in row else f"only {', '.join(row) or 'nothing'}"
                raise InputError(f'{path}, line {number}: expected a string field "{field}", found {found}')
        if "answer" in need and not row["answer"].strip():
            raise InputError(f'{path}, line {number}: its "answer" is empty, so no response could be right')
        rows.append(row)
    if not rows:
        raise InputError(f"{path}: no rows in it")
    return rows


def fail(message: str) -> None:
    line = " ".join(message.split())  # libraries' messages have several
    print(f"{Path(sys.argv[0]).name}: error: {line[:1000]}", file=sys.stderr)
    raise SystemExit(2)


def run_command(main, config) -> None:
    """Run a command's main; what the user can mend is one line and status 2, anything else a traceback. An output pipe
    that was closed (`| head`) ends it with a line as well."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the shell (`>&-`)
            setattr(sys, name, open(os.devnull, "r+"))  # noqa: SIM115
    # A terminal may not know every character; a file shows each line as it comes.
    sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
    try:
        main(config)
        sys.stdout.flush()  # here, where a closed pipe is caught
        if "TORCHELASTIC_RUN_ID" in os.environ:  # One of several ranks. torch keeps gloo's threads alive, which is
            os._exit(0)  # probably why a rank was seen to abort while Python ended.
    except InputError as error:
        fail(str(error))
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        lower = (f"--{name}" for name in ("batch_size", "micro_tokens", "max_new_tokens") if hasattr(config, name))
        fail(f"out of memory; lower {' or '.join(lower)}, if the models fit at all ({error})")
    except KeyboardInterrupt:
        print(f"{Path(sys.argv[0]).name}: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except OSError as error:
        if error.filename is not None:  # a folder that cannot be written, a name that is too long
            fail(f"{error.filename}: {error.strerror}")
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python's own last flush fails as well
        if not isinstance(error, BrokenPipeError):
            fail(f"the output cannot be written ({error.strerror or error})")
        print(f"{Path(sys.argv[0]).name}: output pipe closed", file=sys.stderr)
        raise SystemExit(1) from None
