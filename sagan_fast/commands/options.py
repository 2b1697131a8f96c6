"""Shared by all commands: reads options into a dataclass and reports errors in one sentence."""

import dataclasses
import inspect
import json
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar, get_args, get_type_hints

from sagan_fast.errors import InputError, nearest

T = TypeVar("T")
KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "tuple": "a list such as [8,16]"}


def read_options(command: str, options: type[T], args: list[str], positional: Sequence[str] = ()) -> T:
    """Return the dataclass `options` filled from the command line `args`; InputError if that fails.

    The class is the one list of a command's options: types, defaults and docstrings of its fields become the parser's,
    and its own docstring the description. A boolean is a flag. The fields in `positional` are given without a name.
    """
    parser = command_parser(command, inspect.getdoc(options) or "")
    add_options(parser, options, positional)
    return options(**parser.parse_args(args).as_dict())


def command_parser(command: str, description: str) -> Any:
    """Return the parser of `sagan-fast command`, without options yet; its errors are InputErrors of one sentence."""
    from jsonargparse import ArgumentParser, DefaultHelpFormatter, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)

    class Formatter(DefaultHelpFormatter):  # type: ignore[misc]
        def _expand_help(self, action: Any) -> str:  # the choices stand before it already
            text = re.sub(r"type: Literal\[.*?\], ", "", super()._expand_help(action))
            return re.sub(r" \(default: null\)|, default: null", "", text)

    class SentenceParser(ArgumentParser):  # type: ignore[misc]
        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            raise InputError(_sentence(message, list(self._option_string_actions))) from ex

    return SentenceParser(
        prog=f"sagan-fast {command}",
        description=description,
        epilog="Option names accept dashes and underscores.",
        formatter_class=Formatter,
        allow_abbrev=False,
    )


def add_options(parser: Any, options: type, positional: Sequence[str] = (), skip: Collection[str] = ()) -> None:
    """Add the fields of the dataclass `options` to `parser`, but for those in `skip`."""
    from docstring_parser import parse_from_object

    helps = {parameter.arg_name: parameter.description for parameter in parse_from_object(options).params}
    kinds = get_type_hints(options)
    for field in dataclasses.fields(options):
        if field.name in skip:
            continue
        required, about, kind = field.default is dataclasses.MISSING, helps[field.name], kinds[field.name]
        default = None if required else field.default
        if type(None) in get_args(kind):
            kind = get_args(kind)[0]
        if kind is bool:
            parser.add_argument(f"--{field.name}", action="store_true", help=about)
        elif field.name in positional:
            parser.add_argument(field.name, type=kind, help=about, **({} if required else {"nargs": "?"}))
        else:
            parser.add_argument(f"--{field.name}", type=kind, default=default, required=required, help=about)


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


def _sentence(message: str, known: list[str]) -> str:
    """Return a parser's message as one line that says what the option must be, or which option was meant."""
    line = " ".join(message.split()).replace("Parser key ", "option ")
    if wrong := re.fullmatch(r'option "(.+?)": Expected an? (.+)\. Got value: (.*)', line):
        name, kind, value = wrong.groups()
        choices = ", ".join(re.findall(r"'(.*?)'", kind))
        return f"{name} must be {KINDS.get(choices) or f'one of {choices}'}, got {value!r}"
    if wrong := re.fullmatch(
        r'option "(.+?)": Does not validate .*?Subtypes: \[(.*)\] Errors: .*Given value: (.*)', line
    ):
        name, kinds, value = wrong.groups()
        found = [KINDS.get(kind, kind) for kind in re.findall(r"'(.*?)'", kinds)]
        return f"{name} must be {' or '.join(found)}, got {value!r}"
    if line.startswith("the following arguments are required: "):
        return f"{line.rpartition(': ')[2]} must be given"
    if line.startswith("unrecognized arguments: "):
        options = [word.split("=")[0] for word in line.split()[2:] if word.startswith("--")]
        if options:
            return f"unknown key {options[0][2:]!r}{nearest(options[0][2:], [option.lstrip('-') for option in known])}"
    return line
