"""Matching by hand, and the loss against plain loops over the published definition."""

import math

import pytest
import torch

from sagan_fast.faces.boxes import anchors, corners, encode
from sagan_fast.faces.loss import match, multibox_loss


def iou(a, b):
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    inside = max(w, 0) * max(h, 0)
    return inside / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inside)


ROW = torch.tensor([[x, 50.0, 40.0, 40.0] for x in (20, 30, 60, 200)])
"""Four anchors: boxes 0..40, 10..50, 40..80, 180..220, all from 30 to 70 downwards."""


@pytest.mark.parametrize(
    ("faces", "expected"),
    [
        ([], [-1, -1, -1, -1]),
        ([[2, 30, 42, 70]], [0, 0, -1, -1]),  # 0.9 with the first, 0.67 with the second, by 0.35
        ([[60, 30, 100, 70]], [-1, -1, 0, -1]),  # its best by 0.33: under 0.35, but its best
        ([[75, 30, 115, 70]], [-1, -1, -1, -1]),  # its best by 0.07: left out
        ([[0, 30, 40, 70], [1, 30, 41, 70]], [1, 1, -1, -1]),  # both have the first anchor as their best
        ([[180, 30, 220, 70], [0, 30, 40, 70]], [1, 1, -1, 0]),
        ([[0, 30, 40, 70], [-24, 30, 16, 70]], [1, 0, -1, -1]),  # a neighbour takes its best anchor
    ],
)
def test_matching_by_hand(faces, expected):
    found = match(torch.tensor(faces, dtype=torch.float32).reshape(-1, 4), ROW)
    assert found.tolist() == expected


def match_in_loops(faces, where):
    """The published loops over plain numbers: best anchors above 0.2 count as sure; the last face has a shared one."""
    overlaps = [[iou(face, anchor) for anchor in where] for face in faces]
    best = [max(range(len(where)), key=lambda a, row=row: row[a]) for row in overlaps]
    kept = [n for n, row in enumerate(overlaps) if row[best[n]] >= 0.2]
    owner = [-1] * len(where)
    if not kept:
        return owner
    for a in range(len(where)):
        n = max(range(len(faces)), key=lambda n: overlaps[n][a])
        for j, place in enumerate(best):
            n = j if place == a else n
        overlap = 2 if a in [best[n] for n in kept] else max(row[a] for row in overlaps)
        owner[a] = n if overlap >= 0.35 else -1
    return owner


def drawn_faces(count, generator):
    low = torch.rand(count, 2, generator=generator) * 90
    return torch.cat([low, low + 8 + torch.rand(count, 2, generator=generator) * 90], 1)


def test_matching_and_loss_are_the_published_loops(generator):
    where = anchors(96, 128)
    counts = (0, 1, 5)
    faces = [drawn_faces(count, generator) for count in counts]
    loc = torch.randn(3, len(where), 4, generator=generator, dtype=torch.float64, requires_grad=True)
    conf = torch.randn(3, len(where), 2, generator=generator, dtype=torch.float64, requires_grad=True)
    boxes = corners(where).tolist()
    location = confidence = total = 0.0
    for i, found in enumerate(faces):
        owner = match_in_loops(found.tolist(), boxes)
        assert match(found, where).tolist() == owner
        positive, negative = 0, []
        for a, n in enumerate(owner):
            p, q = conf[i, a].softmax(0).tolist()
            if n < 0:
                negative.append(-math.log(p))
                continue
            positive += 1
            confidence -= math.log(q)
            for got, wanted in zip(
                loc[i, a].tolist(), encode(found[n].double(), where[a].double()).tolist(), strict=True
            ):
                d = abs(got - wanted)
                location += 0.5 * d * d if d < 1 else d - 0.5
        confidence += sum(sorted(negative, reverse=True)[: 7 * positive])
        total += positive
    assert total > 0
    found = multibox_loss(loc, conf, faces, where)
    assert found[0].item() == pytest.approx(location / total, rel=1e-5)
    assert found[1].item() == pytest.approx(confidence / total, rel=1e-9)
    sum(found).backward()
    assert not loc.grad[0].any() and not conf.grad[0].any()  # no face, no negatives


def test_pictures_without_faces_have_no_loss_and_a_gradient_of_zeros(generator):
    where = anchors(64, 64)
    loc = torch.randn(2, len(where), 4, generator=generator, requires_grad=True)
    conf = torch.randn(2, len(where), 2, generator=generator, requires_grad=True)
    losses = multibox_loss(loc, conf, [torch.zeros(0, 4)] * 2, where)
    assert [loss.item() for loss in losses] == [0, 0]
    sum(losses).backward()
    assert not loc.grad.any() and not conf.grad.any()
