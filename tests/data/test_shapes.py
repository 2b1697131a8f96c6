"""The drawn set: the same bytes everywhere, ten distinct classes, pairs that really fit together."""

import hashlib
import pickle

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from sagan_fast.data.shapes import CLASS_NAMES, ShapesDataset
from sagan_fast.errors import InputError


@pytest.fixture(scope="module")
def shapes():
    return ShapesDataset(resolution=32)


def foreground(image):
    """Boolean (R, R): pixels brighter than any background (at most 140 a channel) and not half covered."""
    return image.float().amax(0) > 200


def test_sizes_types_and_labels(shapes):
    assert len(shapes) == 5000 and shapes.num_classes == 10 and shapes.class_names == list(CLASS_NAMES)
    image, label = shapes[4321]
    assert image.dtype == torch.uint8 and image.shape == (3, 32, 32) and label == 1
    assert np.bincount(shapes.labels).tolist() == [500] * 10
    with pytest.raises(IndexError):
        shapes[5000]
    assert torch.equal(shapes[-1][0], shapes[4999][0])


def test_bytes_are_the_same_on_every_machine(shapes):
    data = torch.stack([shapes[i][0] for i in range(0, 5000, 7)]).numpy().tobytes()
    assert hashlib.sha256(data).hexdigest() == "b5d79017a1b01b3438093bd0cccf3cfafadd1a86ca543d21f20f27e837394830"


def test_images_cannot_be_changed_through_what_is_returned(shapes):
    before = shapes[3][0].clone()
    shapes[3][0].zero_()
    assert torch.equal(shapes[3][0], before)


@pytest.mark.parametrize("resolution", [16, 21, 64])
def test_other_resolutions_show_the_same_picture(shapes, resolution):
    other = ShapesDataset(resolution=resolution)
    for index in range(40):
        a, b = (
            interpolate(s[index][0][None].float(), size=(8, 8), mode="bilinear", antialias=True)
            for s in (shapes, other)
        )
        assert (a - b).abs().mean() < 4
        assert (a - b.flip(2)).abs().mean() > 4


@pytest.mark.parametrize("label", range(10))
def test_every_picture_has_a_shape_of_moderate_size_inside_the_frame(shapes, label):
    masks = torch.stack([foreground(shapes[i][0]) for i in range(label, 5000, 10)])
    share = masks.float().mean((1, 2))
    assert share.min() > 0.02 and share.max() < 0.5
    assert not masks[:, 0].any() and not masks[:, -1].any() and not masks[:, :, 0].any() and not masks[:, :, -1].any()


@pytest.mark.parametrize(
    ("label", "flip"), [(5, (1,)), (6, (0, 1)), (7, (0,)), (9, (0,)), (9, (1,))], ids=lambda value: str(value)
)
def test_pairs_are_mirror_images_and_single_shapes_are_not(shapes, label, flip):
    def mismatch(index):  # edge pixels differ a little, as the background is a gradient
        mask = foreground(shapes[index][0])
        return ((mask ^ mask.flip(flip)).sum() / mask.sum()).item()

    assert np.mean([mismatch(index) for index in range(label, 2000, 10)]) < 0.15
    assert np.mean([mismatch(index) for index in range(0, 2000, 10)]) > 0.3


def test_circle_in_square_has_one_centre_and_one_colour(shapes):
    for index in range(8, 1000, 10):
        image = shapes[index][0]
        mask = foreground(image)
        rows, columns = mask.nonzero().T
        frame = torch.stack([rows.min() + rows.max(), columns.min() + columns.max()]) / 2
        inside = (rows - frame[0]).abs().maximum((columns - frame[1]).abs()) < 6
        circle = torch.stack([rows[inside], columns[inside]]).float()
        assert (circle.mean(1) - frame).abs().max() < 1 and inside.sum() > 40
        ring = (rows - frame[0]).abs().maximum((columns - frame[1]).abs()) > 7
        assert (inside | ring).all() and ring.sum() > 60
        assert (image[:, mask].T.float().std(0) < 40).all()


def test_unconditional_has_labels_zero():
    data = ShapesDataset(resolution=16, num_classes=0)
    assert data.num_classes == 0 and data[7][1] == 0


def test_it_can_be_sent_to_a_spawned_worker(shapes):
    assert torch.equal(pickle.loads(pickle.dumps(shapes))[9][0], shapes[9][0])


@pytest.mark.parametrize("resolution", [15, 257])
def test_resolution_out_of_range(resolution):
    with pytest.raises(InputError, match=f"drawn with 16 to 256 pixels a side, not with {resolution}"):
        ShapesDataset(resolution=resolution)


def test_wrong_number_of_classes():
    with pytest.raises(InputError, match=r"shapes has 10 classes .* made for 1000: .*`--num-classes 10`"):
        ShapesDataset(resolution=32, num_classes=1000)
