"""Dots, attention laid over images, and text on pictures: uint8 (3, h, w) throughout, red, green and blue."""

import colorsys
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

Colour = tuple[int, int, int]

COLOURS: tuple[Colour, ...] = (
    (255, 59, 48), (52, 199, 89), (64, 132, 255), (255, 204, 0), (255, 64, 220), (0, 220, 230), (255, 140, 0),
    (160, 110, 255),
)  # fmt: skip
"""Of the queries, in order: red, green, blue, yellow, pink, cyan, orange, violet; `colour` has more."""
GOLDEN = 0.61803398875
"""Share of the circle of hues between two of the further colours: any number of them lie far apart."""

WHITE: Colour = (255, 255, 255)
BLACK: Colour = (0, 0, 0)


def colour(number: int) -> Colour:
    """Return the colour of query `number`: one of COLOURS, then hues that lie between those before, light and dark."""
    if number < len(COLOURS):
        return COLOURS[number]
    hue, light = 0.08 + GOLDEN * number, number % 3
    red, green, blue = colorsys.hsv_to_rgb(hue % 1, (0.55, 0.95, 0.75)[light], (1.0, 0.8, 0.62)[light])
    return round(255 * red), round(255 * green), round(255 * blue)


def enlarged(images: Tensor, at_least: int) -> Tensor:
    """Return `images` (..., h, w) with every pixel repeated until the width is `at_least` pixels; no smoothing."""
    times = max(1, -(-at_least // images.shape[-1]))
    return images.repeat_interleave(times, -2).repeat_interleave(times, -1)


def with_dot(picture: Tensor, x: float, y: float, colour: Colour, radius: float) -> Tensor:
    """Return `picture` with a dot of `colour` at (x, y), ringed in white and black so that it shows on anything."""
    height, width = picture.shape[1:]
    across, down = torch.arange(width) + 0.5 - x, torch.arange(height) + 0.5 - y
    distance = (across.square() + down[:, None].square()).sqrt()
    out = picture.float()
    for share, paint in ((1.0, BLACK), (0.88, WHITE), (0.68, colour)):
        cover = (radius * share - distance + 0.5).clamp(0, 1)  # the share of a pixel inside, so edges are smooth
        out = torch.lerp(out, torch.tensor(paint).float()[:, None, None], cover)
    return out.round().byte()


def lit(picture: Tensor, heat: Tensor, colour: Colour) -> Tensor:
    """Return `picture` dimmed and without its colours, and lit in `colour` where `heat` (h, w) in 0..1 is high.

    From the dimmed image at 0 over the colour to almost white at 1, rising all the way.
    """
    gray = (picture.float() * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0)
    dimmed = (gray * 0.3).expand(3, -1, -1)
    tint = torch.tensor(colour).float()[:, None, None]
    glow = tint + (255 - tint) * ((heat - 0.6) / 0.4).clamp(0, 1) * 0.85
    return torch.lerp(dimmed, glow, heat.clamp(0, 1) * 0.95).round().clamp(0, 255).byte()


def beside(pictures: Sequence[Tensor], gap: int) -> Tensor:
    """Return `pictures` of one height in a row, `gap` white pixels between them."""
    return torch.cat([F.pad(picture, (gap if i else 0, 0), value=255) for i, picture in enumerate(pictures)], 2)


def below(pictures: Sequence[Tensor], gap: int) -> Tensor:
    """Return `pictures` one below the other, left-aligned, `gap` pixels between; what is left over is white."""
    width = max(picture.shape[2] for picture in pictures)
    filled = (F.pad(p, (0, width - p.shape[2], gap if i else 0, 0), value=255) for i, p in enumerate(pictures))
    return torch.cat(list(filled), 1)


def framed(picture: Tensor, border: int) -> Tensor:
    """Return `picture` with `border` white pixels around it."""
    return F.pad(picture, (border,) * 4, value=255)


def text(words: str, size: int, colour: Colour = BLACK) -> Tensor:
    """Return `words` in letters of `size` pixels on white, as tall as a line and as wide as the words."""
    width = int(font(size).getlength(words)) + 2
    image = Image.new("RGB", (max(1, width), round(size * 1.4)), WHITE)
    ImageDraw.Draw(image).text((1, image.height / 2), words, fill=colour, font=font(size), anchor="lm")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def shortened(words: str, size: int, width: int) -> str:
    """Return `words`, cut with "..." where they would be wider than `width` pixels in letters of `size`."""
    if font(size).getlength(words) <= width:
        return words
    while words and font(size).getlength(words + "...") > width:
        words = words[:-1]
    return words.rstrip() + "..."


def paragraph(words: str, size: int, width: int, colour: Colour = BLACK) -> Tensor:
    """Return `words` as `text` does, but in as many lines as a picture of `width` pixels takes; nothing is cut off.

    A word that is wider than the picture is broken.
    """
    lines: list[str] = []
    line = ""
    for word in words.split(" "):
        longer = f"{line} {word}".strip()
        if font(size).getlength(longer) <= width - 2:
            line = longer
            continue
        lines += [line] if line else []
        while font(size).getlength(word) > width - 2 and len(word) > 1:
            fits = next(n for n in range(len(word) - 1, 0, -1) if n == 1 or font(size).getlength(word[:n]) <= width - 2)
            lines.append(word[:fits])
            word = word[fits:]
        line = word
    return below([text(each, size, colour) for each in [*lines, line]], 0)


@functools.lru_cache
def font(size: int) -> Any:
    """Return the letters that Pillow brings along."""
    return ImageFont.load_default(size)
