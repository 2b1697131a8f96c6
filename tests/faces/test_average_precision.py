"""Average precision by hand."""

import pytest
import torch

from sagan_fast.faces.average_precision import accuracy

FACE, OTHER, NOTHING = [0.0, 0.0, 10.0, 10.0], [50.0, 50.0, 70.0, 70.0], [200.0, 0.0, 230.0, 30.0]


def score(pictures):
    """Accuracy of pictures given as (boxes, scores, faces)."""
    boxes, scores, faces = (
        [torch.tensor(part, dtype=torch.float32).reshape(shape) for part in parts]
        for parts, shape in zip(zip(*pictures, strict=True), ((-1, 4), (-1,), (-1, 4)), strict=True)
    )
    return accuracy(boxes, scores, faces)


@pytest.mark.parametrize(
    ("pictures", "average", "found", "wrong"),
    [
        ([([FACE], [0.9], [FACE])], 1.0, 1, 0),
        ([([], [], [FACE])], 0.0, 0, 0),
        ([([FACE], [0.9], [])], 0.0, 0, 1),
        ([([FACE, FACE], [0.9, 0.8], [FACE])], 1.0, 1, 1),  # twice the same face
        ([([FACE, NOTHING], [0.9, 0.8], [FACE, OTHER])], 0.5, 1, 1),
        ([([FACE, NOTHING], [0.8, 0.9], [FACE])], 0.5, 1, 1),
        ([([NOTHING, FACE, OTHER], [0.9, 0.8, 0.7], [FACE, OTHER])], 2 / 3, 2, 1),  # precision 1/2, 2/3: monotonic 2/3
        ([([FACE], [0.9], [FACE]), ([NOTHING], [0.95], [OTHER])], 0.25, 1, 1),  # boxes of all pictures in one order
        ([([[0, 0, 10, 4.9]], [0.9], [FACE])], 0.0, 0, 1),  # overlap 0.49
    ],
)
def test_by_hand(pictures, average, found, wrong):
    result = score(pictures)
    assert result.average_precision == pytest.approx(average) and (result.found, result.wrong) == (found, wrong)
    assert result.recall == pytest.approx(found / result.faces if result.faces else 0)
