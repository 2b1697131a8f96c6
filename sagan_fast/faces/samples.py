"""Reads and augments the annotated pictures of a training, in this process or in others.

Sample p of a run is a picture of the p-th place of endless epochs, augmented by a random state of its own. So a resumed
training sees the same samples, with any number of processes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Sequence
from contextlib import closing

import numpy as np
import torch
from torch import Tensor

from sagan_fast.choices import OnBroken
from sagan_fast.data.dataset import MAX_BROKEN_IN_A_ROW
from sagan_fast.data.loader import epoch_order, ignore_stop_signals, load
from sagan_fast.errors import InputError
from sagan_fast.faces.augment import augment
from sagan_fast.faces.wider import Picture

_order = functools.lru_cache(maxsize=2)(epoch_order)  # one for all samples of an epoch


class Samples:
    """The samples of a training: `self[p]` is sample p, and `self.batch` several of them.

    Args:
        size: width and height of the samples in pixels.
        on_broken: "fail" raises InputError for a picture that cannot be read; "skip" takes the next one.
    """

    def __init__(self, pictures: Sequence[Picture], size: int, seed: int, on_broken: OnBroken = "fail") -> None:
        self.pictures, self.size, self.seed, self.on_broken = pictures, size, seed, on_broken

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, list[str]]:
        """Return the network's input (3, S, S), the faces in it (N, 4), and sentences about pictures left out."""
        count, left_out = len(self.pictures), list[str]()
        place = int(_order(count, self.seed, index // count)[index % count])
        for ahead in range(count):
            picture = self.pictures[(place + ahead) % count]
            try:
                pixels = picture.read()
            except InputError as error:
                if self.on_broken == "fail":
                    raise InputError(f"{error}; --on-broken skip takes another picture instead") from error
                left_out.append(str(error))
                if len(left_out) == MAX_BROKEN_IN_A_ROW:
                    break
                continue
            image, faces = augment(pixels, picture.faces, self.size, np.random.default_rng([self.seed, index]))
            return image, faces, left_out
        raise InputError(f"{len(left_out)} pictures in a row could not be read; the first: {left_out[0]}")

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, list[Tensor], list[str]] | InputError:
        """Return the samples of `indices`: images (B, 3, S, S), the faces of each, and sentences.

        An InputError is returned, since one that is raised leaves another process with its whole traceback.
        """
        try:
            images, faces, left_out = zip(*(self[index] for index in indices), strict=True)
        except InputError as error:
            return InputError(*error.args)
        return torch.stack(images), list(faces), [sentence for found in left_out for sentence in found]


def batches(
    samples: Samples, batch_size: int, first: int, last: int, num_workers: int, say: Callable[[str], None]
) -> Generator[tuple[Tensor, list[Tensor]]]:
    """Yield images (B, 3, S, S) and the faces of each, for the steps from `first` to before `last`.

    `say` gets one sentence about each picture that is left out. Raises InputError as `Samples` does.
    """
    wanted = (list(range(step * batch_size, (step + 1) * batch_size)) for step in range(first, last))
    said = set[str]()
    with closing(load(samples.batch, wanted, num_workers, ignore_stop_signals)) as stream:
        for found in stream:
            if isinstance(found, InputError):
                raise found
            images, faces, left_out = found
            for sentence in left_out:
                if sentence not in said:
                    said.add(sentence)
                    say(f"left out: {sentence}")
            yield images, faces
