"""Shared by all commands: reads options into a dataclass and reports errors in one sentence."""

import argparse
import dataclasses
import functools
import inspect
import json
import os
import re
import textwrap
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_args, get_type_hints

from sagan_fast.choices import KINDS
from sagan_fast.errors import InputError
from sagan_fast.files import RUN, check_exists
from sagan_fast.words import nearest

T = TypeVar("T")
METAVARS: dict[Any, str] = {
    int: "N", float: "X", "tuple": "[N,...]", "data": "SPEC", "out": "FOLDER", "preset": "NAME", "config": "FILE",
    "init_from": "RUN", "resume_from": "STEP", "json": "FILE", "class_id": "CLASS",
    "to_class": "CLASS", "eval_data": "SPEC", "wandb": "PROJECT", "save_statistics": "FILE",
    "inception_weights": "FILE", "face_weights": "FILE", "weights": "FILE", "classes": "FILE", "sweep": "FILE",
    "features": "NAME", "micro_batch_size": "N", "annotations": "FILE", "images": "FOLDER", "val_annotations": "FILE",
    "val_images": "FOLDER",
}  # fmt: skip
"""What stands for a value in the help, by the type or the name of the option."""
OPTIONS: set[str] = set()
"""Names of the fields that are options of the command that runs."""
WORDS = {**{kind.__name__: words for kind, words in KINDS.items()}, "tuple": "a list such as [8,16]"}


def read_options(command: str, options: type[T], args: list[str], positional: Sequence[str] = ()) -> T:
    """Return the dataclass `options` filled from the command line `args`; InputError if that fails.

    The class is the one list of a command's options: types, defaults and docstrings of its fields become the parser's,
    and its own docstring the description. A boolean is a flag. The fields in `positional` are given without a name;
    what is named `checkpoint` must exist.
    """
    parser = command_parser(command, inspect.getdoc(options) or "")
    add_options(parser, options, positional)
    found = options(**parser.parse_args(args).as_dict())
    if "checkpoint" in positional:  # the subject of the command, so before anything about its other options
        check_exists(Path(found.checkpoint), RUN)  # type: ignore[attr-defined]
    return found


def command_parser(
    command: str, description: str, *, usage: str | None = None, epilog: str = "", brief: bool = False
) -> Any:
    """Return the parser of `sagan-fast command`, without options yet; its errors are InputErrors of one sentence.

    Its help writes names with dashes; `brief` takes fewer columns. Set `parser.file` to name the file whose keys are
    parsed as options.
    """
    OPTIONS.clear()
    from jsonargparse import ArgumentParser, DefaultHelpFormatter, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)

    class Formatter(DefaultHelpFormatter):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "max_help_position": 31 if brief else 33})  # type: ignore[no-untyped-call]

        def _format_action_invocation(self, action: Any) -> str:
            text = str(super()._format_action_invocation(action))
            return re.sub(r"--[\w.]+", lambda name: dashed(name[0]), text)

        def _format_usage(self, *args: Any) -> str:
            return re.sub(r"--[\w.]+", lambda name: dashed(name[0]), str(super()._format_usage(*args)))

        def _expand_help(self, action: Any) -> str:
            text = " ".join(str(super()._expand_help(action)).split())
            start = max(text.rfind(mark) for mark in (" (required", " (type: ", " (default: "))
            start = max(text.rfind(" (type: "), text.rfind(" (required")) if " (type: " in text else start
            about, tail = (text[:start], text[start:-1]) if start >= 0 and text.endswith(")") else (text, "")
            about = re.sub(r"[a-z]+(_[a-z]+)+", lambda word: dashed(word[0]) if is_option(word[0]) else word[0], about)
            default = tail.partition("default: ")[2] or None
            hidden = default is None or default in ("null", "", "False", "''") or "default:" in about
            if default and re.fullmatch(r"\(.*\)", default):
                default = f"[{default[1:-1].rstrip(',').replace(' ', '')}]"  # as it is given
            return about if hidden else f"{about} ({default})" if brief else f"{about} (default: {default})"

        def _fill_text(self, text: str, width: int, indent: str) -> str:
            parts = (" ".join(part.split()) for part in re.split(r"\n\n|\v", text))
            filled = [textwrap.fill(part, width, initial_indent=indent, break_on_hyphens=False) for part in parts]
            return ("\n" if "\v" in text else "\n\n").join(filled)  # \v: a new line, not a paragraph

    class SentenceParser(ArgumentParser):  # type: ignore[misc]
        file = ""

        def parse_args(self, args: Any = None, *more: Any, **others: Any) -> Any:
            self.check_known(args or ())  # before anything that the mistyped option should have given is missed
            return super().parse_args(args, *more, **others)

        def check_known(self, args: Sequence[str]) -> None:
            for arg in args:
                if arg.startswith("--") and len(arg) > 2 and arg.partition("=")[0] not in self._option_string_actions:
                    self.error(f"unrecognized arguments: {arg}")

        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            raise InputError(_sentence(message, list(self._option_string_actions), self.file)) from ex

    def is_option(word: str) -> bool:
        return any(option.endswith((f"--{word}", f".{word}")) for option in parser._option_string_actions)

    parser = SentenceParser(
        prog=f"sagan-fast {command}",
        usage=usage,
        description=description,
        epilog=epilog,
        formatter_class=Formatter,
        add_help=not brief,
        allow_abbrev=False,
    )
    return parser


def add_options(
    parser: Any,
    options: type,
    positional: Sequence[str] = (),
    skip: Collection[str] = (),
    *,
    only: Collection[str] | None = None,
    prefix: str = "",
    helps: Mapping[str, str] | None = None,
    values: bool = False,
) -> None:
    """Add the fields of the dataclass `options` to `parser`, but for those in `skip`, or those in `only`.

    A boolean is a flag; with `values` it may be followed by true or false, and no field is required. `helps`
    replaces their docstrings in the help, and leaves out of it what is not in there.
    """
    kinds = get_type_hints(options)
    for field in dataclasses.fields(options):
        if field.name in skip or (only is not None and field.name not in only):
            continue
        required = field.default is dataclasses.MISSING and not values
        name, kind = f"--{prefix}{field.name}", kinds[field.name]
        OPTIONS.add(f"{prefix}{field.name}")
        about = (_helps(options) if helps is None else helps).get(field.name, argparse.SUPPRESS)
        default = None if field.default is dataclasses.MISSING else field.default
        if type(None) in get_args(kind):
            kind = get_args(kind)[0]
        metavar = (
            field.metadata.get("metavar")
            or METAVARS.get(kind)
            or METAVARS.get(field.name)
            or (METAVARS["tuple"] if "tuple" in str(kind) else None)
        )
        shown = {"metavar": metavar} if metavar else {"metavar": "NAME"} if helps is not None else {}
        if kind is bool and not values:
            parser.add_argument(name, action="store_true", help=about)
        elif kind is bool:
            parser.add_argument(
                name, type=bool, nargs="?", const=True, default=default, help=about, metavar="true|false"
            )
        elif field.name in positional:
            OPTIONS.discard(f"{prefix}{field.name}")
            parser.add_argument(field.name, type=kind, help=about, **({} if required else {"nargs": "?"}))
        else:
            parser.add_argument(name, type=kind, default=default, required=required, help=about, **shown)


@functools.cache
def _helps(options: type) -> dict[str, str]:
    from docstring_parser import parse_from_object

    parents = [parent for parent in reversed(options.__mro__) if dataclasses.is_dataclass(parent)]
    return {found.arg_name: found.description or "" for each in parents for found in parse_from_object(each).params}


@contextmanager
def said_once() -> Iterator[None]:
    """Let only the first of torchrun's processes report an InputError, since all read the same command line."""
    try:
        yield
    except InputError:
        if int(os.environ.get("RANK", "0")):
            raise SystemExit(2) from None
        raise


def as_options(values: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return nested `values` as command-line options, so that a file's keys are checked as options are."""
    tokens = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            tokens += as_options(value, f"{prefix}{key}.")
        elif value is not None:
            text = value if isinstance(value, str) else json.dumps(value)
            tokens.append(f"--{prefix}{key}={text}")
    return tokens


def underscored(args: list[str]) -> list[str]:
    """Return `args` with the dashes inside option names as underscores; values are left alone."""
    return [
        "--" + name.replace("-", "_") + equals + value if arg.startswith("--") and len(arg) > 2 else arg
        for arg in args
        for name, equals, value in [arg[2:].partition("=")]
    ]


def dashed(name: str) -> str:
    """Return an option's name as it is written in help and messages: with dashes."""
    return name.replace("_", "-")


def as_typed(message: str) -> str:
    """Return `message` with options written as on the command line: `batch_size` becomes `--batch-size`.

    A name without an underscore is an option only as the subject of the sentence. What is quoted, part of a path or
    after a colon stays as it is: those are names of classes, files and keys.
    """
    subject = r"^[a-z][\w.]*(?= must | cannot | is for )"
    anywhere = r"(?<![\w./'\"`=-])(?<!: )[a-z0-9.]+(?:_[a-z0-9]+)+(?![\w/'\"`(]|\.\w)"
    return re.sub(
        f"{subject}|{anywhere}", lambda name: f"--{dashed(name[0])}" if name[0] in OPTIONS else name[0], message
    )


def check_is_folder(out: str, endings: Collection[str]) -> None:
    """Raise InputError if --out, a folder to be, is a file or is named like one of the files that are put into it."""
    path = Path(out)
    if path.exists() and not path.is_dir():
        raise InputError(f"--out must name a folder, and {out} is a file")
    if path.suffix.lower() in endings and not path.exists():
        raise InputError(f"--out must name a folder for the files, such as {path.with_suffix('')}, got {out}")


def _sentence(message: str, known: list[str], file: str = "") -> str:
    """Return a parser's message as one line that says what the option must be, or which option was meant.

    With `file` the options are the keys of that file, and are named as there.
    """
    line = " ".join(message.split()).replace("Parser key ", "option ")

    def called(name: str) -> str:
        if file:
            return f"{file}: {name}"
        return f"--{dashed(name)}" if f"--{name}" in known else name

    if wrong := re.fullmatch(r'option "(.+?)": Expected an? (.+)\. Got value: (.*)', line):
        name, kind, value = wrong.groups()
        choices = ", ".join(re.findall(r"'(.*?)'", kind))
        if choices == "int" and (whole := re.fullmatch(r"'?(\d+)\.0'?", value)):
            return f"{called(name)} must be {WORDS[choices]}: write {whole[1]}"
        return f"{called(name)} must be {WORDS.get(choices) or f'one of {choices}'}, got {value!r}"
    if wrong := re.fullmatch(
        r'option "(.+?)": Does not validate .*?Subtypes: \[(.*)\] Errors: .*Given value: (.*)', line
    ):
        name, kinds, value = wrong.groups()
        found = [WORDS.get(kind, kind) for kind in re.findall(r"'(.*?)'", kinds)]
        return f"{called(name)} must be {' or '.join(found)}, got {value!r}"
    if line.startswith("the following arguments are required: "):
        lacking = [called(name.lstrip("-")) for name in line.rpartition(": ")[2].split(", ")]
        return f"{' and '.join(lacking)} must be given"
    if line.startswith("unrecognized arguments: "):
        words = line.split()[2:]
        options = [word.split("=")[0] for word in words if word.startswith("--")]
        if options:
            return f"unknown option {dashed(options[0])}{nearest(dashed(options[0]), map(dashed, known))}"
        if words[0].startswith("-"):
            return f"unknown option {words[0]}{nearest(f'-{words[0]}', map(dashed, known))}"
        return f"what is {words[0]!r} for? This command takes no further argument"
    if alone := re.fullmatch(r"argument (--\S+): expected one argument", line):
        return f"{dashed(alone[1])} must be followed by a value"
    return re.sub(r"--[\w.]+", lambda name: dashed(name[0]), line)
