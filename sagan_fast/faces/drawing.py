"""Draws the boxes of faces, with their scores, into pictures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from sagan_fast.faces.pictures import Pixels
from sagan_fast.visualize.drawing import COLOURS


def with_boxes(pixels: Pixels, faces: Sequence[tuple[Sequence[float], float]]) -> Pixels:
    """Return a copy of `pixels` (H, W, 3) with each box (x1 y1 x2 y2) as a frame under its score in per cent."""
    image = Image.fromarray(pixels)
    draw = ImageDraw.Draw(image)
    wide = max(1, round(max(image.size) / 400))
    for number, (box, score) in enumerate(faces):
        colour = COLOURS[(number + 1) % len(COLOURS)]
        x1, y1, x2, y2 = (round(value) for value in box)
        draw.rectangle((x1, y1, max(x1, x2), max(y1, y2)), outline=colour, width=wide)
        font = ImageFont.load_default(max(10, min(24, 8 * wide)))
        words = f"{score:.0%}"
        _, _, width, height = font.getbbox(words)
        top = max(0, y1 - int(height) - 2)
        draw.rectangle((x1, top, x1 + int(width) + 3, top + int(height) + 2), fill=colour)
        draw.text((x1 + 2, top), words, fill=(0, 0, 0), font=font)
    return np.array(image)
