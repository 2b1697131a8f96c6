"""Draws the curves of a run as SVG, the same for the page and for the report."""

import json
import math
from collections.abc import Sequence
from fnmatch import fnmatch
from html import escape
from typing import Any

CHARTS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("Losses", "Of the discriminator (D) and the generator (G).", ("d_loss", "g_loss")),
    ("Scores of the discriminator", "Higher: taken for real. The two lines should stay apart but near.",
     ("d_real", "d_fake")),
    ("FID", "Distance to the real images. Lower is better.", ("eval/fid", "eval/intra_fid")),
    ("Other scores", "Of the evaluations during training.", ("eval/*",)),
    ("Gamma of attention", "How much attention adds. It starts at 0.", ("gamma/*",)),
    ("Gradient norms", "Length of the gradient of all weights.", ("grad_norm/*",)),
    ("Largest sigma", "Largest spectral norm of a weight. A sudden rise announces divergence.", ("sigma_max/*",)),
    ("Penalties", "Terms that are added to the loss of the discriminator.", ("r1", "r2", "gradient_penalty", "lecam")),
    ("Images per second", "Speed of the training.", ("images_per_s",)),
)  # fmt: skip
"""Title, meaning, and the names in log.jsonl. A name is drawn by the first chart that it fits."""
NAMES = {
    "d_loss": "D loss", "g_loss": "G loss", "d_real": "real images", "d_fake": "generated images", "r1": "R1",
    "r2": "R2", "gradient_penalty": "gradient penalty", "lecam": "LeCam", "images_per_s": "images/s",
    "grad_norm/d": "discriminator", "grad_norm/g": "generator",
    "sigma_max/d": "discriminator", "sigma_max/g": "generator",
}  # fmt: skip
POINTS = 400
"""Most points of a line; of longer logs, each point is the mean of as many lines as needed."""
WIDTH, HEIGHT = 400, 200
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 24
"""Margins, for the labels of the axes."""


def charts(lines: Sequence[dict[str, Any]]) -> str:
    """Return the charts of the log `lines` as HTML; a sentence if there is nothing to draw."""
    left = dict.fromkeys(name for line in lines for name, value in line.items() if _is_number(value))
    out = []
    for title, meaning, patterns in CHARTS:
        chosen = [name for name in left if any(fnmatch(name, pattern) for pattern in patterns)]
        for name in chosen:
            del left[name]
        series = [(_label(name), *_points(lines, name)) for name in chosen]
        series = [one for one in series if one[1]]
        if series:
            out.append(_chart(title, meaning, series))
    return "".join(out) or '<p class="none">The log has no lines yet.</p>'


def number(value: float) -> str:
    """Return `value` with four significant digits."""
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Return round numbers in [low, high], about so many."""
    step = 10 ** math.floor(math.log10((high - low) / about))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (factor * step) <= about + 0.5)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


Series = tuple[str, list[int], list[float]]


def _points(lines: Sequence[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Return steps and values of `name`, at most POINTS of them."""
    found = [(int(line["step"]), float(line[name])) for line in lines if _is_number(line.get(name))]
    size = max(1, -(-len(found) // POINTS))
    groups = [found[i : i + size] for i in range(0, len(found), size)]
    return [group[-1][0] for group in groups], [math.fsum(v for _, v in group) / len(group) for group in groups]


def _chart(title: str, meaning: str, series: Sequence[Series]) -> str:
    steps = [step for _, xs, _ in series for step in xs]
    values = [value for _, _, ys in series for value in ys if math.isfinite(value)] or [0.0]
    x_low, x_high = min(steps), max(steps)
    x_high = max(x_high, x_low + 1)
    low, high = min(values), max(values)
    margin = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    low, high = low - margin, high + margin

    def x(step: float) -> float:
        return round(LEFT + (step - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT), 1)

    def y(value: float) -> float:
        return round(TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM), 1)

    drawn = []
    for tick in ticks(low, high):
        drawn.append(f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick)}" y2="{y(tick)}"/>')
        drawn.append(f'<text class="tick end" x="{LEFT - 6}" y="{y(tick) + 4}">{number(tick)}</text>')
    for tick in ticks(x_low, x_high):
        place = min(x(tick), WIDTH - RIGHT - 8)
        drawn.append(f'<text class="tick middle" x="{place}" y="{HEIGHT - 6}">{tick:,.0f}</text>')
    legend, readable = [], []
    for i, (label, xs, ys) in enumerate(series):
        colour = f"c{i % 6}"
        for part in _unbroken(xs, ys):
            if len(part) == 1:
                drawn.append(f'<circle class="{colour}" cx="{x(part[0][0])}" cy="{y(part[0][1])}" r="3"/>')
            else:
                places = " ".join(f"{x(step)},{y(value)}" for step, value in part)
                drawn.append(f'<polyline class="{colour}" points="{places}"/>')
        last = number(ys[-1])
        legend.append(f'<li><span class="key {colour}"></span>{escape(label)} <b data-last="{last}">{last}</b></li>')
        readable.append({"steps": xs, "values": [number(value) for value in ys], "at": [x(step) for step in xs]})
    said = ", ".join(f"{label} {number(ys[-1])}" for label, _, ys in series)
    about = f"{title} from step {x_low:,} to {max(steps):,}. At the end: {said}."
    return (
        f'<figure class="chart"><figcaption><h3>{title}</h3><p>{meaning}</p></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(about)}" '
        f"data-lines='{escape(json.dumps(readable))}'>{''.join(drawn)}"
        f'<line class="cursor" y1="{TOP}" y2="{HEIGHT - BOTTOM}" x1="-9" x2="-9"/></svg>'
        f'<ul class="legend">{"".join(legend)}<li class="at" data-last="at step {max(steps):,}">'
        f"at step {max(steps):,}</li></ul></figure>"
    )


def _unbroken(xs: Sequence[int], ys: Sequence[float]) -> list[list[tuple[int, float]]]:
    """Return the points in pieces, broken where a value is NaN or infinite."""
    pieces: list[list[tuple[int, float]]] = [[]]
    for step, value in zip(xs, ys, strict=True):
        if math.isfinite(value):
            pieces[-1].append((step, value))
        elif pieces[-1]:
            pieces.append([])
    return [piece for piece in pieces if piece]


def _label(name: str) -> str:
    if name in NAMES:
        return NAMES[name]
    place, _, rest = name.partition("/")
    if place == "gamma":
        return rest.replace("g.attentions.", "generator ").replace("d.attentions.", "discriminator ")
    return rest.upper() if place == "eval" and len(rest) < 4 else (rest or name).replace("_", " ")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
