"""Anchors, box codes and non-maximum suppression of FaceBoxes.

A box is x1, y1, x2, y2 in pixels of the network's input; an anchor is given by its centre and its size.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torchvision.ops import box_convert
from torchvision.ops import nms as torchvision_nms

STRIDES = (32, 64, 128)
SIZES = ((32, 64, 128), (256,), (512,))
"""Sides of the square anchors at each stride, in pixels."""
TILES = {32: 4, 64: 2}
"""Anchors of these sides lie this many a row and column in each cell, from its upper left corner; the others once, in
its centre. Every side is then four times the distance between neighbours: the density of all anchors is 4."""
VARIANCES = (0.1, 0.2)
"""Of centres and of sizes in box codes."""


@functools.lru_cache(maxsize=32)
def anchors(height: int, width: int) -> Tensor:
    """Return the anchors of an input of this size as (A, 4): centre x, centre y, width, height in pixels, float32.

    They come in the order of the network's output: map by map, row by row, cell by cell, then by size and place in the
    cell. None is clipped. The tensor is shared by all who ask for the same size: do not write into it. Raises
    ValueError for a size under one pixel. Source: layers/functions/prior_box.py of the published PyTorch port.
    """
    if height < 1 or width < 1:
        raise ValueError(f"anchors: height and width must be at least 1, got {height} and {width}")
    maps = []
    for stride, sizes in zip(STRIDES, SIZES, strict=True):
        rows, columns = -(-height // stride), -(-width // stride)
        in_cell = []
        for size in sizes:
            tiles = TILES.get(size, 1)
            places = torch.arange(tiles, dtype=torch.float64) / tiles if size in TILES else torch.tensor([0.5]).double()
            y, x = torch.meshgrid(places, places, indexing="ij")
            side = torch.full_like(x, size)
            in_cell.append(torch.stack([x * stride, y * stride, side, side], -1).flatten(0, 1))
        y, x = (torch.arange(n, dtype=torch.float64) * stride for n in (rows, columns))
        corners = torch.zeros(rows, columns, 1, 4, dtype=torch.float64)
        corners[..., 0], corners[..., 1] = x[None, :, None], y[:, None, None]
        maps.append((corners + torch.cat(in_cell)).flatten(0, 2))
    return torch.cat(maps).float()


def corners(boxes: Tensor) -> Tensor:
    """Return `boxes` (..., 4), given by centre and size, as x1, y1, x2, y2."""
    return box_convert(boxes, "cxcywh", "xyxy")


def encode(boxes: Tensor, anchors: Tensor) -> Tensor:
    """Return the codes (..., 4) of `boxes` (..., 4), x1 y1 x2 y2 with positive sides, relative to `anchors` (..., 4).

    Offsets of the centre in anchor sizes over 0.1, and logarithms of the ratios of sizes over 0.2.
    """
    found = box_convert(boxes, "xyxy", "cxcywh")
    centre = (found[..., :2] - anchors[..., :2]) / (VARIANCES[0] * anchors[..., 2:])
    return torch.cat([centre, (found[..., 2:] / anchors[..., 2:]).log() / VARIANCES[1]], -1)


def decode(codes: Tensor, anchors: Tensor) -> Tensor:
    """Return the boxes x1 y1 x2 y2 (..., 4) that `codes` (..., 4) stand for: the inverse of `encode`."""
    sides = anchors[..., 2:]
    centre = anchors[..., :2].addcmul(codes[..., :2], sides, value=VARIANCES[0])
    half = (codes[..., 2:] * VARIANCES[1]).exp() * sides / 2
    return torch.cat([centre - half, centre + half], -1)


def nms(boxes: Tensor, scores: Tensor, overlap: float) -> Tensor:
    """Return the indices (K,) of the `boxes` (N, 4) that remain, highest of `scores` (N,) first.

    A box falls where it overlaps a better one by more than `overlap`, intersection over union. As in the published
    code, sides are one pixel longer than x2 - x1, since a box there includes its last row and column.
    """
    return torchvision_nms(boxes + boxes.new_tensor([0, 0, 1, 1]), scores, overlap)
