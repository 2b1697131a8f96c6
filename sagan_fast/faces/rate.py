"""The share of images with a face: a cheap probe of a generator of faces."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F

from sagan_fast.distributed import World
from sagan_fast.errors import InputError
from sagan_fast.evaluation.evaluate import Progress, with_scores
from sagan_fast.evaluation.statistics_file import StatisticsFile
from sagan_fast.evaluation.streams import Images, StoredImages
from sagan_fast.faces.detector import Detector

SIDE = 256
"""Images are enlarged or shrunk to this many pixels before faces are sought: a face that fills an image of 64 pixels
is then of the size that the anchors have."""


def face_rate(
    images: Images, detector: Detector, world: World, advance: Callable[[int], None] = lambda done: None
) -> tuple[float, int]:
    """Return the share of `images` in which `detector` finds a face, 0 to 1, and their number.

    Each process takes every `world.size`-th batch; all have the same result. Raises InputError on every process for
    images that cannot be read or made.
    """
    with_face, number, failure = 0, 0, ""
    try:
        for batch in images.units(range(world.rank, images.num_units, world.size)):
            resized = F.interpolate(batch.float(), size=[SIDE, SIDE], mode="bilinear", antialias=True)
            for image in resized.round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu():
                with_face += len(detector(image.contiguous())[1]) > 0
            number += len(batch)
            advance(len(batch))
    except InputError as error:
        failure = str(error)
    shared = world.gather((with_face, number, failure))
    if failures := [sentence for _, _, sentence in shared if sentence]:
        raise InputError(failures[0])
    total = sum(count for _, count, _ in shared)
    return sum(found for found, _, _ in shared) / total, total


def with_face_rates(
    result: dict[str, Any] | None, what: Mapping[str, Any], detector: Detector, world: World, progress: Progress
) -> dict[str, Any] | None:
    """Return `result` of `evaluate` with face_rate and face_rate_real, the shares of images with a face.

    face_rate_of and face_rate_real_of are the numbers of images, and the protocol's entry "faces" says how they were
    measured. An empty `result` gets a protocol of its own; None, of processes but the first, stays None.

    Args:
        what: the arguments of `evaluate`. As many real images are taken as generated ones, if there are as many.
    """
    generated, dataset, protocol = what["generated"], what["dataset"], what["protocol"]
    sets: dict[str, Images] = {"face_rate": generated}
    if not isinstance(dataset, StatisticsFile):
        count = min(generated.count, len(dataset))
        sets["face_rate_real"] = StoredImages(
            dataset, count, seed=protocol.seed, batch_size=protocol.batch_size, num_workers=what["num_workers"]
        )
    rates: dict[str, Any] = {}
    for key, images in sets.items():
        rates[key], rates[f"{key}_of"] = face_rate(images, detector, world, progress("faces", images.count))
    if result is None or not world.is_main:
        return None
    faces = {"detector": "FaceBoxes", "sha256": detector.sha256, "min_score": detector.min_score, "size": SIDE}
    return with_scores(result, what, rates, faces=faces)
