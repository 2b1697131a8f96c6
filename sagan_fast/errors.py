"""The exception for bad input: its message is all that the user needs."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Bad input from a user; the command line prints the message and exits with status 2."""


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ": did you mean 'x'?" with the word of `known` nearest to `word`, or "" if none is near."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f": did you mean {near[0]!r}?" if near else ""
