"""Command-line flags from a dataclass: one field a flag, with its default, its help and its bounds in one place."""

import argparse
import dataclasses
import difflib
import sys
from pathlib import Path

from data import InputError, fail


def flag(
    default, help: str, *, group: str = "", choices: tuple = (), least: float | None = None, most: float | None = None,
    above: float | None = None, below: float | None = None,
):
    """A field of a configuration dataclass. `group` opens a group of flags in --help, to which all those after it
    belong. choices, or bounds (least and most are allowed themselves, above and below are not), are what check_flags
    accepts."""
    bounds = {"at least": least, "at most": most, "above": above, "below": below}
    bounds = {word: bound for word, bound in bounds.items() if bound is not None}
    return dataclasses.field(
        default=default, metadata={"help": help, "group": group, "choices": choices, "bounds": bounds}
    )


def check_flags(config) -> None:
    """Raise InputError at the first field outside its choices or bounds, or with a number that torch cannot hold."""
    for f in dataclasses.fields(config):
        value, choices = getattr(config, f.name), f.metadata["choices"]
        if choices and value not in choices:
            raise InputError(f"--{f.name} {value}: expected one of {', '.join(filter(None, choices))}")
        for word, bound in f.metadata["bounds"].items():
            inside = {"at least": value >= bound, "at most": value <= bound, "above": value > bound,
                      "below": value < bound}
            if not inside[word]:  # NaN is inside nothing
                raise InputError(f"--{f.name} must be {word} {bound}, found {value}")
        limit = {int: 2**63, float: 3e38}.get(type(value))
        if limit and not abs(value) < limit:
            raise InputError(f"--{f.name} must be below {limit}, found {value}")


def parse_flags(cls, doc: str, argv: list[str] | None = None):
    """An instance of the configuration dataclass `cls` from the command line: `--name value` or `--name=value`.

    A bool field is a switch (`--name`, or `--name on|off`). `typed` of the result holds the names given on the command
    line. A flag that is unknown, ill-typed or out of bounds ends the program with one line and status 2, naming the
    nearest real flag.
    """
    def boolean(text: str) -> bool:
        if text.lower() not in ("true", "false", "on", "off", "1", "0"):
            raise ValueError(text)
        return text.lower() in ("true", "on", "1")

    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, exit_on_error=False,
        usage=f"{Path(sys.argv[0]).name} [--flag value ...]",
    )
    fields, into = {f.name: f for f in dataclasses.fields(cls)}, parser
    for name, f in fields.items():
        into = parser.add_argument_group(f.metadata["group"]) if f.metadata["group"] else into
        kind = type(f.default)
        help = f"{f.metadata['help']} ({f.default!r})".replace("%", "%%")
        switch = {"nargs": "?", "const": True, "type": boolean, "metavar": "bool"} if kind is bool else {}
        options = {"type": kind, "metavar": kind.__name__} | switch
        into.add_argument(f"--{name}", default=argparse.SUPPRESS, help=help, **options)
    try:
        typed, unknown = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        fail(str(error).replace("argument ", ""))
    if unknown:
        name = unknown[0].split("=")[0].lstrip("-")
        near = difflib.get_close_matches(name, fields, n=1)
        fail(f"unknown flag {unknown[0].split('=')[0]}" + (f"; did you mean --{near[0]}?" if near else " (see --help)"))
    config = cls(**vars(typed))
    config.typed = set(vars(typed))
    try:
        check_flags(config)
    except InputError as error:
        fail(str(error))
    return config
