"""Words for sentences: numbers with their nouns, and lists that are cut short."""

from collections.abc import Sequence


def count(number: int, singular: str, plural: str = "") -> str:
    """Return number and noun, such as "1 class" or "12 classes"; without `plural` it ends in s or es."""
    many = plural or singular + ("es" if singular.endswith("s") else "s")
    return f"{number} {singular if number == 1 else many}"


def list_some(names: Sequence[str], limit: int = 4) -> str:
    """Return the first few of `names` in a row, with "..." where some were left out."""
    return ", ".join([*names[:limit], *(["..."] if len(names) > limit else [])])
