"""The one exception that means: the input was at fault, and its message is all the user needs."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Bad input from a user (an option, a folder, a file); the command line prints the sentence and exits with 2."""


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ": did you mean 'x'?" for the word of `known` that is nearest to `word`, or nothing if none is near."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f": did you mean {near[0]!r}?" if near else ""
