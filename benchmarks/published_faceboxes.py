"""FaceBoxes as published, from pixels to boxes: what users of the PyTorch port run for each picture.

The steps of test.py and of 3DDFA_V2's FaceBoxes.py: blue, green, red as OpenCV reads them, made float32 and turned in
NumPy, the network in eager mode, anchors in Python for each picture, and suppression in a NumPy loop. The loop stands
for their Cython code. Both take less than 1 % of the time where a picture has a few faces.
"""

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sagan_fast.faces.network import FaceBoxes

MEAN = np.array([104, 117, 123], np.float32)
STEPS, SIZES = (32, 64, 128), ((32, 64, 128), (256,), (512,))
PLACES = {32: (0, 0.25, 0.5, 0.75), 64: (0, 0.5)}


class Published:
    """Maps uint8 (H, W, 3), blue green red, to boxes (K, 4) and scores (K,) as NumPy arrays.

    `min_score` is that of a candidate.
    """

    def __init__(self, weights: Path, min_score: float = 0.5) -> None:
        self.net = FaceBoxes().load_weights(weights).eval().requires_grad_(False)
        self.min_score = min_score

    def __call__(self, pixels: Any) -> tuple[Any, Any]:
        """Return the boxes and scores of a picture, the best first."""
        height, width = pixels.shape[:2]
        image = np.float32(pixels)
        image -= MEAN
        with torch.no_grad():
            loc, conf = self.net(torch.from_numpy(image.transpose(2, 0, 1))[None])
        anchors = torch.Tensor(anchors_in_python(height, width)).view(-1, 4)
        boxes = decoded(loc[0], anchors).numpy() * np.array([width, height] * 2, np.float32)
        scores = conf[0].numpy()[:, 1]
        kept = np.where(scores > self.min_score)[0]
        order = kept[scores[kept].argsort()[::-1][:5000]]
        left = suppressed(boxes[order], scores[order], 0.3)[:750]
        return boxes[order][left], scores[order][left]


def anchors_in_python(height: int, width: int) -> list[float]:
    """Return the anchors as shares of the picture, one number after the other."""
    found: list[float] = []
    for step, sizes in zip(STEPS, SIZES, strict=True):
        for i, j in itertools.product(range(math.ceil(height / step)), range(math.ceil(width / step))):
            for size in sizes:
                places = PLACES.get(size, (0.5,))
                dense_x = [x * step / width for x in [j + place for place in places]]
                dense_y = [y * step / height for y in [i + place for place in places]]
                for y, x in itertools.product(dense_y, dense_x):
                    found += [x, y, size / width, size / height]
    return found


def decoded(loc: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
    """Return the boxes (A, 4) of all codes, x1 y1 x2 y2 as shares of the picture."""
    boxes = torch.cat((
        anchors[:, :2] + loc[:, :2] * 0.1 * anchors[:, 2:], anchors[:, 2:] * torch.exp(loc[:, 2:] * 0.2),
    ), 1)  # fmt: skip
    boxes[:, :2] -= boxes[:, 2:] / 2
    boxes[:, 2:] += boxes[:, :2]
    return boxes


def suppressed(boxes: Any, scores: Any, overlap: float) -> list[int]:
    """Return the indices that remain, the best first (utils/nms/py_cpu_nms.py)."""
    x1, y1, x2, y2 = boxes.T
    areas = (x2 - x1 + 1) * (y2 - y1 + 1)
    order, kept = scores.argsort()[::-1], []
    while order.size > 0:
        i, rest = order[0], order[1:]
        kept.append(int(i))
        w = np.maximum(0.0, np.minimum(x2[i], x2[rest]) - np.maximum(x1[i], x1[rest]) + 1)
        h = np.maximum(0.0, np.minimum(y2[i], y2[rest]) - np.maximum(y1[i], y1[rest]) + 1)
        order = rest[w * h / (areas[i] + areas[rest] - w * h) <= overlap]
    return kept
