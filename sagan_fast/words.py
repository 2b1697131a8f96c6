"""Words for sentences: numbers with their nouns, lists cut short, and what a mistyped name may have meant."""

import difflib
from collections.abc import Iterable, Sequence


def counted(number: int, singular: str, plural: str = "") -> str:
    """Return number and noun, such as "no classes", "1 class" or "12 classes"; the plural ends in s or es by itself."""
    many = plural or singular + ("es" if singular.endswith("s") else "s")
    return f"{number or 'no'} {singular if number == 1 else many}"


def list_some(names: Sequence[str], limit: int = 4) -> str:
    """Return the first few of `names` in a row, with "..." where some were left out."""
    return ", ".join([*names[:limit], *(["..."] if len(names) > limit else [])])


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ": did you mean 'x'?" with the word of `known` nearest to `word`, or "" if none is near.

    Where `word` is the last part of several names with dots, all of these are meant.
    """
    known = list(known)
    near = difflib.get_close_matches(word, known, n=1)
    ends = [name for name in known if name.endswith(f".{word.lstrip('-')}")]
    meant = near if word in near or not ends else ends
    return f": did you mean {' or '.join(map(repr, meant))}?" if meant else ""
