"""The figure of the SAGAN paper (its figures 1 and 5): an image with coloured dots, and a map for each dot.

A dot and its map have the same colour. Each map is scaled from its smallest to its largest value, and drawn faintly if
attention is nearly even. The number under a map is its peak: the largest weight divided by that of even attention, 1/M.
A map whose peak is below NEARLY_EVEN has no place to show: its panel is evenly lit, and says so.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sagan_fast.layers.self_attention import SelfAttention2d
from sagan_fast.visualize import drawing
from sagan_fast.visualize.attention_maps import centre_of, heat, on_picture, rows_of
from sagan_fast.visualize.grids import to_uint8

PANEL = 160
"""Smallest width of a panel in pixels; small images are enlarged without smoothing."""
LARGE_PANEL = 240
"""The same in an animation of one column: two panels are some 500 pixels wide."""
GAP = 6
LETTERS = 13
FOOTER = "Each map shows where the dot of its colour looks. Peak: largest weight relative to even attention."
NEARLY_EVEN = 1.1
ACROSS = 6
"""Most panels beside an image; more go into further lines."""


def figure_row(
    image: Tensor, layer: SelfAttention2d, x: Tensor, queries: Sequence[int], title: str | None = None
) -> Tensor:
    """Return one image's row of the figure as a uint8 picture (3, h, w).

    `image` (3, R, R) in [-1, 1]; `x` (1, C, H, W) what `layer` saw of it; `queries` positions of its map. The image
    comes first, with all dots, `title` under it; then a panel a query, in lines of up to ACROSS.
    """
    picture = drawing.enlarged(to_uint8(image[None])[0], PANEL)
    map_size = (x.shape[2], x.shape[3])
    heats, peaks = _heats(layer, x, queries, picture)
    dotted, panels = picture, []
    for i, query in enumerate(queries):
        colour = drawing.colour(i)
        place = centre_of(query, map_size, *picture.shape[1:])
        dotted = _dot(dotted, place, colour)
        is_even = peaks[i] < NEARLY_EVEN
        panel = _dot(
            drawing.lit(picture, torch.full_like(heats[i], 0.3) if is_even else heats[i], colour), place, colour
        )
        words = f"nearly even, {peaks[i]:.2f}x" if is_even else f"peak {peaks[i]:.{1 if peaks[i] >= 2 else 2}f}x"
        panels.append(_captioned(panel, words))
    first = _captioned(dotted, title or "")
    lines = [panels[i : i + ACROSS] for i in range(0, max(len(panels), 1), ACROSS)]
    height = max(part.shape[1] for part in (first, *lines[0]))
    beside = [_filled(part, height) for part in (first, *lines[0])]
    blank = torch.full((3, 1, first.shape[2]), 255, dtype=torch.uint8)
    further = [drawing.beside([_filled(blank, line[0].shape[1]), *line], GAP) for line in lines[1:]]
    return drawing.below([drawing.beside(beside, GAP), *further], GAP)


def figure(rows: Sequence[Tensor]) -> Tensor:
    """Return the whole figure: `rows` of `figure_row` one below the other, and a line that explains "peak"."""
    words = drawing.paragraph(FOOTER, LETTERS, max(row.shape[2] for row in rows), (110, 110, 110))
    return drawing.framed(drawing.below([*rows, words], GAP), GAP)


def sweep_path(map_size: tuple[int, int], frames: int) -> list[int]:
    """Return up to `frames` positions of a path over the whole map, line by line in alternating directions.

    Lines are as many as make steps along and across them about equal.
    """
    H, W = map_size
    lines = max(1, min(H, round((frames * H / W) ** 0.5)))
    columns = max(1, min(W, frames // lines))
    path = []
    for line in range(lines):
        row = int((line + 0.5) * H / lines)
        along = [row * W + int((column + 0.5) * W / columns) for column in range(columns)]
        path += along if line % 2 == 0 else along[::-1]
    return path


def sweep_frames(images: Tensor, layer: SelfAttention2d, xs: Tensor, frames: int) -> list[Tensor]:
    """Return uint8 frames (3, h, w): a query that moves over each of `images` (B, 3, R, R), with its map beside it.

    `xs` (B, C, H, W) is what `layer` saw of them. Images stand in two columns if there are more than two.
    """
    map_size = (xs.shape[2], xs.shape[3])
    path = sweep_path(map_size, frames)
    pictures = drawing.enlarged(to_uint8(images), PANEL if len(images) > 2 else LARGE_PANEL)
    size = pictures.shape[2:]
    moving: list[list[Tensor]] = [[] for _ in path]
    for picture, x in zip(pictures, xs, strict=True):
        heats, _ = _heats(layer, x[None], path, picture)
        for i, query in enumerate(path):
            place, colour = centre_of(query, map_size, *size), drawing.COLOURS[0]
            seen = _dot(drawing.lit(picture, heats[i], colour), place, colour)
            moving[i].append(drawing.beside([_dot(picture, place, colour), seen], GAP))
    across = 1 if len(images) <= 2 else 2
    return [
        drawing.framed(
            drawing.below([drawing.beside(cells[i : i + across], 3 * GAP) for i in range(0, len(cells), across)], GAP),
            GAP,
        )
        for cells in moving
    ]


def _heats(layer: SelfAttention2d, x: Tensor, queries: Sequence[int], picture: Tensor) -> tuple[Tensor, Tensor]:
    """Return the brightness (Q, h, w) of the maps of `queries` on `picture` (3, h, w), and their peaks (Q,)."""
    rows = rows_of(layer, x, queries).cpu()
    peaks = rows.amax(1) * rows.shape[1]
    return heat(on_picture(rows, (x.shape[2], x.shape[3]), layer.pool, *picture.shape[1:]), peaks), peaks


def _dot(picture: Tensor, place: tuple[float, float], colour: drawing.Colour) -> Tensor:
    return drawing.with_dot(picture, *place, colour, radius=max(4.5, picture.shape[2] / 32))


def _captioned(picture: Tensor, words: str) -> Tensor:
    lines = drawing.paragraph(words, LETTERS, picture.shape[2])
    return torch.cat([picture, F.pad(lines, (0, picture.shape[2] - lines.shape[2]), value=255)], dim=1)


def _filled(picture: Tensor, height: int) -> Tensor:
    return F.pad(picture, (0, 0, 0, height - picture.shape[1]), value=255)
