"""What all commands share: options with dashes or underscores, errors in a sentence that name the nearest key."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

from sagan_fast.distributed import rank
from sagan_fast.errors import InputError

DASHES = "Options may be written with dashes or underscores."


def command_parser(command: str, description: str) -> Any:
    """Return the parser of `sagan-fast command`; its errors are InputErrors of one sentence."""
    from jsonargparse import ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)

    class SentenceParser(ArgumentParser):  # type: ignore[misc]
        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            raise InputError(_sentence(message, list(self._option_string_actions))) from ex

    return SentenceParser(prog=f"sagan-fast {command}", description=description, epilog=DASHES)


@contextmanager
def said_once() -> Iterator[None]:
    """Let the first of torchrun's processes alone say an InputError that all of them meet, as they read one line."""
    try:
        yield
    except InputError:
        if rank():
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
    """Return a parser's message as one line; for an unknown option with the nearest known one."""
    line = " ".join(message.split()).replace("Parser key ", "option ")
    if line.startswith("unrecognized arguments: "):
        options = [word.split("=")[0] for word in line.split()[2:] if word.startswith("--")]
        if options:
            return f"unknown key {options[0].lstrip('-')!r}{nearest(options[0], known)}"
    return line


def nearest(word: str, known: list[str]) -> str:
    """Return ": did you mean X?" for the known word nearest to `word`, or nothing."""
    near = difflib.get_close_matches(word, known, n=1)
    return f": did you mean {near[0].lstrip('-')!r}?" if near else ""
