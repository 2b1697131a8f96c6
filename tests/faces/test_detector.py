"""The detector finds what the network says, in any kind of picture, and says what is no picture."""

import numpy as np
import pytest
import torch
from PIL import Image

from sagan_fast.errors import InputError
from sagan_fast.faces import Detector, FaceBoxes, anchors
from sagan_fast.faces.boxes import corners, encode, nms
from sagan_fast.faces.pictures import MEAN, as_input, as_pixels


class Planted:
    """Stands for the network: boxes with scores, in the codes of the anchors they are nearest to."""

    def __init__(self, boxes, scores):
        self.boxes, self.scores, self.seen = torch.tensor(boxes).float(), torch.tensor(scores).float(), None

    def __call__(self, x):
        self.seen = x
        where = anchors(*x.shape[2:])
        codes = torch.zeros(1, len(where), 5)
        codes[..., 4] = -20
        for box, score in zip(self.boxes, self.scores, strict=True):
            nearest = (corners(where) - box).abs().sum(1).masked_fill(codes[0, :, 4] > -20, torch.inf).argmin()
            codes[0, nearest, :4] = encode(box, where[nearest])
            codes[0, nearest, 4] = score.logit()
        return codes


@pytest.fixture
def detector(random_weights):
    return Detector(random_weights)


def planted(detector, boxes, scores):
    detector._codes = Planted(boxes, scores)
    return detector


def test_boxes_above_the_score_after_suppression_best_first(detector, rng):
    boxes = [[10.0, 20, 60, 70], [100, 30, 170, 110], [12, 22, 62, 72], [150, 200, 190, 250]]
    planted(detector, boxes, [0.7, 0.95, 0.9, 0.45])
    found, scores = detector(rng.integers(0, 256, (260, 300, 3), dtype=np.uint8))
    torch.testing.assert_close(found, torch.tensor([boxes[1], boxes[2]]).float(), rtol=0, atol=1e-3)
    torch.testing.assert_close(scores, torch.tensor([0.95, 0.9]))
    assert found.dtype == scores.dtype == torch.float32 and not found.requires_grad


def test_nothing_found_is_empty(detector, rng):
    found, scores = planted(detector, [], [])(rng.integers(0, 256, (50, 40, 3), dtype=np.uint8))
    assert found.shape == (0, 4) and scores.shape == (0,)


def test_boxes_are_in_pixels_of_the_picture_given(random_weights, rng):
    detector = planted(Detector(random_weights, max_side=200), [[10.0, 20, 60, 70]], [0.9])
    found, _ = detector(rng.integers(0, 256, (300, 400, 3), dtype=np.uint8))
    assert detector._codes.seen.shape == (1, 3, 150, 200)
    torch.testing.assert_close(found, torch.tensor([[20.0, 40, 120, 140]]), rtol=0, atol=1e-3)
    detector = planted(Detector(random_weights, enlarge=2), [[10.0, 20, 60, 70]], [0.9])
    found, _ = detector(rng.integers(0, 256, (60, 50, 3), dtype=np.uint8))
    assert detector._codes.seen.shape == (1, 3, 120, 100)
    torch.testing.assert_close(found, torch.tensor([[5.0, 10, 30, 35]]), rtol=0, atol=1e-3)


def test_the_result_is_the_networks(random_weights, rng):
    """Against the steps written out with the network as published."""
    pixels = rng.integers(0, 256, (97, 150, 3), dtype=np.uint8)
    net = FaceBoxes().load_weights(random_weights).eval()
    x = torch.from_numpy(pixels[:, :, ::-1].astype(np.float32) - np.array(MEAN, np.float32)).permute(2, 0, 1)[None]
    with torch.no_grad():
        loc, conf = net(x)
    level = float(conf[0, :, 1].quantile(0.9))
    found, scores = Detector(random_weights, min_score=level)(pixels)
    where = anchors(97, 150)
    kept = conf[0, :, 1] > level
    centre = where[kept, :2] + 0.1 * loc[0, kept, :2] * where[kept, 2:]
    size = where[kept, 2:] * (0.2 * loc[0, kept, 2:]).exp()
    boxes = torch.cat([centre - size / 2, centre + size / 2], 1)
    order = nms(boxes, conf[0, kept, 1], 0.3)[:750]
    near = min(20, len(order))  # rounding may swap neighbours in score far down
    assert len(found) == pytest.approx(len(order), abs=2)
    torch.testing.assert_close(scores[:near], conf[0, kept, 1][order][:near], rtol=0, atol=1e-5)
    torch.testing.assert_close(found[:near], boxes[order][:near], rtol=1e-3, atol=2e-2)


def test_all_kinds_of_pictures(detector, tmp_path, rng):
    """Gray, RGBA, palette, 16 bits, wide and flat, as files and as arrays: what the network sees is RGB."""
    rgb = rng.integers(0, 256, (40, 64, 3), dtype=np.uint8)
    gray = rgb[:, :, 0]
    kinds = {
        "rgb.png": (Image.fromarray(rgb), rgb),
        "gray.png": (Image.fromarray(gray), np.stack([gray] * 3, 2)),
        "rgba.png": (Image.fromarray(np.dstack([rgb, np.full_like(gray, 255)])), rgb),
        "wide.tif": (Image.fromarray(gray.astype(np.uint16) << 8), np.stack([gray] * 3, 2)),
        "clear.png": (Image.fromarray(np.dstack([rgb, np.zeros_like(gray)])), np.full_like(rgb, 255)),
    }
    planted(detector, [], [])
    for name, (image, expected) in kinds.items():
        image.save(tmp_path / name)
        detector(tmp_path / name)
        assert torch.equal(detector._codes.seen, as_input(expected)), name
    for array in (gray, gray[:, :, None], np.dstack([rgb, np.full_like(gray, 255)]), gray.astype(np.uint16) << 8):
        assert as_pixels(array).shape == (40, 64, 3)
    assert np.array_equal(as_pixels(torch.from_numpy(rgb)), rgb)


@pytest.mark.parametrize(("height", "width"), [(10, 10_000), (10, 10), (1, 1), (300, 1)])
def test_extreme_sizes(random_weights, height, width, rng):
    for max_side in (None, 640):
        detector = Detector(random_weights, max_side=max_side)
        boxes, scores = detector(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        assert len(boxes) == len(scores) <= 750 and bool(boxes.isfinite().all())


def test_what_is_no_picture(detector, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    for path, why in ((tmp_path / "broken.jpg", "not an image that Pillow can read"), (tmp_path / "no.png", "No such")):
        with pytest.raises(InputError, match=why) as caught:
            detector(path)
        assert str(path) in str(caught.value)
    for array in (np.zeros((4, 5, 2), np.uint8), np.zeros((4, 5, 3)), np.zeros(7, np.uint8)):
        with pytest.raises(InputError, match=r"a picture must be uint8 \(H, W, 3\) in RGB, got"):
            detector(array)
    with pytest.raises(InputError, match="at least one pixel"):
        detector(np.zeros((0, 5, 3), np.uint8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_score": 0}, "min_score must be between 0 and 1, got 0"),
        ({"max_side": 0}, "max_side must be at least 1, got 0"),
        ({"enlarge": 0}, "enlarge must be above 0"),
        ({"precision": "int4"}, "precision must be one of fp32, bf16, got 'int4'"),
    ],
)
def test_options_out_of_range(random_weights, options, message):
    with pytest.raises(InputError, match=message):
        Detector(random_weights, **options)


def test_bf16_is_near(random_weights, rng):
    x = as_input(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    with torch.no_grad():
        exact, near = (Detector(random_weights, precision=p)._codes(x) for p in ("fp32", "bf16"))
    assert near.dtype == torch.float32
    assert 0 < float((exact - near).norm() / exact.norm()) < 0.05


@pytest.mark.slow
def test_compiled_is_the_same(random_weights, rng):
    x = as_input(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    with torch.no_grad():
        torch.testing.assert_close(
            Detector(random_weights, compile=True)._codes(x), Detector(random_weights)._codes(x), rtol=1e-3, atol=1e-4
        )


def test_the_published_weights_find_the_astronaut(weights, photographs):
    boxes, scores = Detector(weights)(photographs / "astronaut.png")
    assert len(boxes) == 1 and float(scores[0]) > 0.99
    torch.testing.assert_close(boxes[0], torch.tensor([181.0, 67, 270, 176]), rtol=0, atol=1)


def test_the_published_weights_find_no_face_where_there_is_none(weights, photographs):
    detector = Detector(weights)
    for name in ("brick.png", "grass.png", "coffee.png", "chelsea.png", "rocket.jpg"):
        assert len(detector(photographs / name)[0]) == 0, name
