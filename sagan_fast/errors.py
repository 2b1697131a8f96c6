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
    """Return ": did you mean 'x'?" with the word of `known` nearest to `word`, or "" if none is near.

    Where `word` is the last part of several names with dots, all of these are meant.
    """
    known = list(known)
    near = difflib.get_close_matches(word, known, n=1)
    ends = [name for name in known if name.endswith(f".{word.lstrip('-')}")]
    meant = near if word in near or not ends else ends
    return f": did you mean {' or '.join(map(repr, meant))}?" if meant else ""
