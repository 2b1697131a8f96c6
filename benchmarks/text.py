"""Tables as plain text or Markdown, and the generated parts of pages, with nothing but the standard library."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def table(columns: str, rows: Sequence[Sequence[Any]], markdown: bool = False) -> str:
    """Return rows as aligned plain text, or as a Markdown table; `columns` are names between bars, None is a dash."""
    header = [name.strip() for name in columns.split("|")]
    cells = [[_text(cell) for cell in row] for row in rows]
    if markdown:
        lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
        return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in cells)])
    widths = [max(len(row[i]) for row in [header, *cells]) for i in range(len(header))]
    numeric = [all(_is_number(row[i]) for row in cells) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        columns = zip(row, widths, numeric, strict=True)
        return "  ".join(c.rjust(w) if n else c.ljust(w) for c, w, n in columns).rstrip()

    return "\n".join([line(header), "  ".join("-" * w for w in widths), *map(line, cells)])


def replaced(path: Path, begin: str, end: str, content: str) -> str:
    """Return the text of the page at `path` with `content` between the lines `begin` and `end`, which stay.

    Raises ValueError unless the page holds both markers once.
    """
    text = path.read_text()
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"{path} must hold these lines once each: {begin} and {end}")
    return text[: text.index(begin) + len(begin)] + content + text[text.index(end) :]


def _text(cell: Any) -> str:
    if cell is None:
        return "-"
    if isinstance(cell, float):
        return f"{cell:.2f}" if cell < 100 else f"{cell:.0f}"
    return str(cell)


def _is_number(text: str) -> bool:
    return text == "-" or text.replace(".", "", 1).replace(",", "").isdigit()
