"""Anchors, codes and suppression against their definitions, written out in loops."""

import itertools
import math

import pytest
import torch

from sagan_fast.faces.boxes import SIZES, STRIDES, TILES, anchors, corners, decode, encode, nms


def published_anchors(height, width):
    """The loops of prior_box.py, in pixels and float64."""
    found = []
    steps = {32: (0, 0.25, 0.5, 0.75), 64: (0, 0.5)}
    for stride, sizes in zip(STRIDES, SIZES, strict=True):
        for i, j in itertools.product(range(math.ceil(height / stride)), range(math.ceil(width / stride))):
            for size in sizes:
                for y, x in itertools.product(steps.get(size, (0.5,)), repeat=2):
                    found.append([(j + x) * stride, (i + y) * stride, size, size])
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize(
    ("height", "width", "count"),
    [(480, 640, 6400), (1024, 1024, 21824), (640, 640, 8525), (1, 1, 23), (33, 65, None), (127, 129, None),
     (10, 10_000, None)],
)  # fmt: skip
def test_anchors_are_the_published_ones(height, width, count):
    found, expected = anchors(height, width), published_anchors(height, width)
    assert found.dtype == torch.float32 and found.shape == expected.shape
    assert count is None or len(found) == count
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-4)


def test_all_sizes_have_the_density_four():
    """Every side is four times the distance between neighbours, so a point is covered by 16 squares of each size."""
    found = anchors(1024, 1024)
    for stride, sizes in zip(STRIDES, SIZES, strict=True):
        for size in sizes:
            of_size = found[found[:, 2] == size]
            for axis in (0, 1):
                gaps = of_size[:, axis].unique().diff()
                assert torch.all(gaps == size / 4), (size, gaps)
            assert len(of_size) == (1024 // stride * TILES.get(size, 1)) ** 2
            point = torch.tensor([511.3, 487.7])
            inside = ((of_size[:, :2] - point).abs() < size / 2).all(1)
            assert int(inside.sum()) == 16


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (-3, 4)])
def test_no_picture_no_anchors(size):
    with pytest.raises(ValueError, match="height and width must be at least 1"):
        anchors(*size)


def drawn_boxes(count, generator, dtype=torch.float64):
    low = torch.rand(count, 2, generator=generator, dtype=dtype) * 400
    return torch.cat([low, low + 1 + torch.rand(count, 2, generator=generator, dtype=dtype) * 200], 1)


def test_codes_and_back(generator):
    where = anchors(480, 640).double()
    chosen = where[torch.randint(len(where), (500,), generator=generator)]
    boxes = drawn_boxes(500, generator)
    codes = encode(boxes, chosen)
    torch.testing.assert_close(decode(codes, chosen), boxes, rtol=1e-10, atol=1e-9)
    torch.testing.assert_close(decode(codes.float(), chosen.float()), boxes.float(), rtol=1e-4, atol=2e-2)


def test_a_code_by_hand():
    anchor = torch.tensor([[100.0, 50.0, 32.0, 64.0]])
    box = torch.tensor([[100.0, 18.0, 132.0, 82.0]])  # centre 116, 50; as large as the anchor
    torch.testing.assert_close(encode(box, anchor), torch.tensor([[16 / 3.2, 0.0, 0.0, 0.0]]))
    wider = decode(torch.tensor([[0.0, 0.0, math.log(2) / 0.2, 0.0]]), anchor)
    torch.testing.assert_close(wider, torch.tensor([[68.0, 18.0, 132.0, 82.0]]))
    torch.testing.assert_close(corners(anchor), torch.tensor([[84.0, 18.0, 116.0, 82.0]]))


def brute_force(boxes, scores, overlap):
    """The published loop (utils/nms/py_cpu_nms.py) over plain numbers."""
    order, kept = sorted(range(len(boxes)), key=lambda i: -scores[i]), []
    for i in order:
        a = boxes[i]
        for j in kept:
            b = boxes[j]
            w = max(0.0, min(a[2], b[2]) - max(a[0], b[0]) + 1)
            h = max(0.0, min(a[3], b[3]) - max(a[1], b[1]) + 1)
            areas = [(c[2] - c[0] + 1) * (c[3] - c[1] + 1) for c in (a, b)]
            if w * h / (sum(areas) - w * h) > overlap:
                break
        else:
            kept.append(i)
    return kept


@pytest.mark.parametrize("count", [0, 1, 60, 300])
def test_nms_is_the_published_loop(count, generator):
    boxes, scores = drawn_boxes(count, generator).round(), torch.rand(count, generator=generator).double()
    found = nms(boxes, scores, 0.3)
    assert found.tolist() == brute_force(boxes.tolist(), scores.tolist(), 0.3)


def test_nms_counts_the_last_pixel():
    """Two boxes that overlap by 0.3 exactly only where the last row and column are left out."""
    boxes = torch.tensor([[0.0, 0.0, 9.0, 9.0], [0.0, 5.0, 9.0, 14.0]]).double()  # 50 of 150 pixels; 36 of 126 without
    assert nms(boxes, torch.tensor([0.9, 0.8]).double(), 0.3).tolist() == [0]
    assert nms(boxes, torch.tensor([0.9, 0.8]).double(), 0.34).tolist() == [0, 1]
