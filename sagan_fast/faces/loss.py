"""What FaceBoxes learns: faces matched to anchors, and the MultiBox loss with hard negatives.

Both follow the published PyTorch port (utils/box_utils.py, layers/modules/multibox_loss.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_iou

from sagan_fast.faces.boxes import corners, encode

MIN_OVERLAP = 0.35
"""An anchor that overlaps a face by this much, intersection over union, has to find it."""
MIN_BEST_OVERLAP = 0.2
"""A face whose best anchor overlaps it by less is left out: it is too small or too thin to be found."""
NEGATIVES = 7
"""Anchors without a face that count, for each one with a face: those with the highest loss."""
LOC_WEIGHT = 2.0


def match(faces: Tensor, anchors: Tensor) -> Tensor:
    """Return for each of `anchors` (A, 4) the index (A,) of the face it has to find, -1 where there is none.

    `faces` (N, 4) are x1, y1, x2, y2. A face gets its best anchor whatever else overlaps it; where two faces have the
    same best anchor, the later one gets it. All other anchors find the face that they overlap most, if by
    `MIN_OVERLAP`. As in the published code, a face that is left out still takes its best anchor from another face.
    """
    nobody = torch.full((len(anchors),), -1, dtype=torch.int64, device=anchors.device)
    if not len(faces):
        return nobody
    overlaps = box_iou(faces, corners(anchors))  # (N, A)
    best_of_face, place = overlaps.max(1)
    kept = best_of_face >= MIN_BEST_OVERLAP
    if not bool(kept.any()):
        return nobody
    best_of_anchor, face = overlaps.max(0)
    owner = nobody.scatter_reduce(0, place, torch.arange(len(faces), device=anchors.device), "amax")
    face = torch.where(owner >= 0, owner, face)
    sure = torch.zeros_like(nobody, dtype=torch.bool).index_fill_(0, place[kept], True)
    return torch.where(sure | (best_of_anchor >= MIN_OVERLAP), face, nobody)


def multibox_loss(loc: Tensor, conf: Tensor, faces: Sequence[Tensor], anchors: Tensor) -> tuple[Tensor, Tensor]:
    """Return the losses of location and of confidence, scalars; training minimises LOC_WEIGHT * location + confidence.

    Smooth L1 of the box codes of anchors that have a face, and cross-entropy of these and of the `NEGATIVES` times as
    many hardest others of each image. Both are sums over the number of anchors with a face in the batch.

    Args:
        loc: box codes (B, A, 4).
        conf: logits of background and face (B, A, 2).
        faces: one tensor (N, 4) of x1 y1 x2 y2 an image; N may be 0.
        anchors: (A, 4), as `boxes.anchors` gives them.
    """
    owners = torch.stack([match(found, anchors) for found in faces])  # (B, A)
    positive = owners >= 0
    total = positive.sum().clamp(min=1)
    targets = [
        encode(found[owner[mine]], anchors[mine])
        for found, owner, mine in zip(faces, owners, positive, strict=True)
        if len(found)
    ]
    wanted = torch.cat(targets) if targets else loc.new_zeros(0, 4)
    location = F.smooth_l1_loss(loc[positive], wanted, reduction="sum")
    entropy = F.cross_entropy(conf.transpose(1, 2), positive.long(), reduction="none")  # (B, A)
    with torch.no_grad():
        hardness = entropy.masked_fill(positive, 0)
        rank = hardness.argsort(1, descending=True).argsort(1)
        count = (NEGATIVES * positive.sum(1, keepdim=True)).clamp(max=len(anchors) - 1)
        counted = positive | (rank < count)
    return location / total, entropy[counted].sum() / total
