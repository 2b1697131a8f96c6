"""Between two samples: along an arc from one z to another, mixtures of two classes, and the same draws truncated."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sagan_fast.errors import InputError


def slerp(start: Tensor, end: Tensor, share: Tensor) -> Tensor:
    """Return points (B, T, D) on the arcs from `start` to `end` (B, D), at the `share` (T,) of the way, 0 to 1.

    Directions turn at a steady angle and lengths go linearly, so every point is as typical of a normal z as the ends
    (Shoemake 1985; White 2016, arXiv 1609.04468, §2.1); a straight line would pass near 0. Where the ends point the
    same or opposite ways there is no arc, and the line is taken.
    """
    lengths = start.norm(dim=1)[:, None, None], end.norm(dim=1)[:, None, None]
    a, b = F.normalize(start.double(), dim=1)[:, None], F.normalize(end.double(), dim=1)[:, None]
    t = share.double()[None, :, None]
    angle = (a * b).sum(2, keepdim=True).clamp(-1, 1).acos()
    sine = angle.sin()
    arc = (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / sine.clamp_min(1e-12)
    direction = torch.where(sine > 1e-6, arc, (1 - t) * a + t * b)
    points: Tensor = direction * ((1 - t) * lengths[0] + t * lengths[1])
    return points.to(start.dtype)


def mixed_classes(start: Tensor, end: Tensor, share: Tensor, num_classes: int) -> Tensor:
    """Return weights of the classes (B, T, num_classes), from `start` to `end` (B,) int64 at the `share` (T,) between.

    The generator mixes its class embeddings (the gains and biases of its batch norms) by them.
    """
    a, b = F.one_hot(start, num_classes).float()[:, None], F.one_hot(end, num_classes).float()[:, None]
    t = share.float()[None, :, None]
    return (1 - t) * a + t * b


def truncated(z: Tensor, truncation: float | None) -> Tensor:
    """Return normal `z` squeezed into [-T, T] so that it is distributed as a normal one cut off there.

    Each number keeps its quantile, so the same z at several T is the same draw, more or less typical. None is z itself.
    Raises InputError unless T is positive.
    """
    if truncation is None:
        return z
    if not truncation > 0:
        raise InputError(f"truncation must be positive, got {truncation}")
    low, high = torch.special.ndtr(torch.tensor([-truncation, truncation], dtype=torch.float64))
    squeezed: Tensor = torch.special.ndtri(low + torch.special.ndtr(z.double()) * (high - low))
    return squeezed.clamp(-truncation, truncation).to(z.dtype)
