"""Exceptions whose message is all that the user needs."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Bad input from a user; the command line prints the message and exits with status 2."""


class Diverged(RuntimeError):
    """Training has diverged; the message says how. `healthy_until` is the last step without any sign of it."""

    def __init__(self, message: str, healthy_until: int = 0) -> None:
        super().__init__(message)
        self.healthy_until = healthy_until


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ": did you mean 'x'?" with the word of `known` nearest to `word`, or "" if none is near."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f": did you mean {near[0]!r}?" if near else ""
