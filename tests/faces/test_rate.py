"""The share of images with a face, in one process and among several."""

from dataclasses import dataclass

import pytest
import torch

from sagan_fast.distributed import World
from sagan_fast.errors import InputError
from sagan_fast.evaluation.streams import Images
from sagan_fast.faces.rate import SIDE, face_rate


class Bright:
    """Stands for a detector: a face is where the image is bright."""

    min_score, sha256 = 0.5, "0"

    def __call__(self, pixels):
        assert pixels.shape == (SIDE, SIDE, 3) and pixels.dtype == torch.uint8
        scores = torch.tensor([0.9] if pixels.float().mean() > 127 else [])
        return torch.zeros(len(scores), 4), scores


class Levels(Images):
    """Images of one gray level each, in batches of two."""

    def __init__(self, levels):
        super().__init__(torch.zeros(len(levels), dtype=torch.int64), 0, 2)
        self.levels = levels

    def units(self, numbers):
        for unit in numbers:
            batch = [torch.full((3, 8, 8), float(self.levels[i])) for i in self.unit_range(unit)]
            if any(image[0, 0, 0] < 0 for image in batch):
                raise InputError("an image cannot be read")
            yield torch.stack(batch).byte()


@dataclass
class Two:
    """The other of two processes has found one of two."""

    rank, size, is_main = 0, 2, True

    def gather(self, content):
        return [content, (1, 2, "")]


def alone():
    return World(torch.device("cpu"))


def test_the_share_of_all():
    told = []
    assert face_rate(Levels([200, 10, 250, 0, 255]), Bright(), alone(), told.append) == (0.6, 5)
    assert told == [2, 2, 1]


def test_processes_share_the_batches():
    assert face_rate(Levels([200, 10, 250, 0, 255]), Bright(), Two()) == (3 / 5, 5)  # batches 0 and 2 here


def test_an_image_that_cannot_be_read():
    with pytest.raises(InputError, match="^an image cannot be read$"):
        face_rate(Levels([200, -1]), Bright(), alone())
