"""Scores a detector: average precision of its boxes against annotated faces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import box_iou


@dataclass(frozen=True)
class Accuracy:
    """What a detector found of the annotated faces of some pictures.

    Attributes:
        average_precision: area under precision, made monotonic, over recall (PASCAL VOC 2010 and later).
        recall: share of the faces that were found, at any score.
        found, wrong, faces: numbers of right boxes, of other boxes, and of faces.
    """

    average_precision: float
    recall: float
    found: int
    wrong: int
    faces: int


def accuracy(
    boxes: Sequence[Tensor], scores: Sequence[Tensor], faces: Sequence[Tensor], overlap: float = 0.5
) -> Accuracy:
    """Return the accuracy of `boxes` (K, 4) with `scores` (K,), one pair a picture, against its `faces` (N, 4).

    From the best score down, a box is right if it overlaps a face by `overlap`, intersection over union, that no better
    box has found; it is held against the face that it overlaps most.
    """
    total = sum(len(one) for one in faces)
    ranked: list[tuple[float, bool]] = []
    for found, value, truth in zip(boxes, scores, faces, strict=True):
        taken = [False] * max(1, len(truth))
        overlaps = box_iou(found, truth) if len(found) and len(truth) else torch.zeros(len(found), 1)
        for i in value.argsort(descending=True).tolist():
            best = int(overlaps[i].argmax())
            hit = float(overlaps[i, best]) >= overlap and not taken[best]
            if hit:
                taken[best] = True
            ranked.append((float(value[i]), hit))
    ranked.sort(key=lambda pair: -pair[0])
    right = torch.tensor([hit for _, hit in ranked], dtype=torch.float64)
    hits = right.cumsum(0)
    count = int(right.sum())
    if not total or not len(right):
        return Accuracy(0.0, 0.0, count, len(right) - count, total)
    precision = hits / torch.arange(1, len(right) + 1, dtype=torch.float64)
    envelope = precision.flip(0).cummax(0).values.flip(0)
    return Accuracy(float((envelope * right).sum()) / total, count / total, count, len(right) - count, total)
