"""Describes how a score was measured: another protocol changes the FID of a checkpoint by 4 to 5."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Iterable
from importlib.metadata import version
from typing import Any, get_args

from sagan_fast.choices import (
    BatchNorm,
    Metric,
    ProtocolName,
    Quantisation,
    Resize,
    Weights,
    check_choice,
    check_choices,
    check_least,
)
from sagan_fast.errors import InputError
from sagan_fast.version import __version__
from sagan_fast.words import counted, nearest

METRICS = get_args(Metric)
BESIDE = FACE_RATE, GAN_TEST = "face-rate", "gan-test"
"""The metrics that need another network, and so are not of "all": a face detector, a classifier of the real images."""


@dataclasses.dataclass(frozen=True)
class Protocol:
    """The settings of an evaluation; `PRESETS` holds the two common sets of them."""

    name: ProtocolName = "clean"
    """the preset it came from"""
    count: int = 50_000
    """number of generated images; default for a folder of images: all of them"""
    reference_count: int | None = None
    """number of real images, chosen at random with the seed; default: all"""
    feature_resize: Resize = "antialias-bicubic"
    """method of resizing images for the feature network"""
    feature_size: int | None = None
    """width and height to resize images to for the feature network; default: the size it was trained on"""
    quantise: Quantisation = "uint8"
    """uint8 rounds generated images as a PNG does; none scores them as floats"""
    splits: int = 10
    """number of equal parts of the images; IS is the mean over the parts"""
    batch_norm: BatchNorm = "running"
    """batch-norm statistics: running (averages from training), batch (of each batch), or standing (averaged anew before
    sampling)"""
    standing_batches: int = 200
    """number of batches averaged for standing statistics"""
    truncation: float | None = None
    """truncation trick: draw z from a normal distribution truncated to [-T, T]"""
    weights: Weights = "average"
    """weights of the generator: averaged, or of the last step"""
    seed: int = 0
    """random seed of the generated images, and of the choice of real images"""
    batch_size: int = 64
    """number of images computed at a time; changes the scores only with batch_norm batch or standing"""
    kid_subsets: int = 100
    """number of random subsets averaged for KID"""
    kid_subset_size: int = 1000
    """number of images in each KID subset; all if there are fewer"""
    neighbours: int = 5
    """number of nearest neighbours for precision, recall, density and coverage"""
    keep: int = 10_000
    """number of generated and of real images for KID, precision, recall, density and coverage; FID and IS use all"""

    def __post_init__(self) -> None:
        check_least(1, self, "splits", "standing_batches", "batch_size", "kid_subsets", "neighbours")
        check_least(2, self, "count", "reference_count", "kid_subset_size", "keep")
        check_choices(self)

    def check_splits(self) -> None:
        """Raise InputError unless each part of the images has one; for IS."""
        if self.splits > self.count:
            raise InputError(
                f"splits must be at most the count, got {self.splits} for {counted(self.count, 'image')}: take fewer "
                "splits, more images, or leave out the metric is"
            )

    @classmethod
    def preset(cls, name: ProtocolName, **overrides: Any) -> Protocol:
        """Return the protocol `name` of `PRESETS` with `overrides`; an override of None keeps the preset's value."""
        check_choice("protocol", name, ProtocolName)
        given = {key: value for key, value in overrides.items() if value is not None}
        return cls(name=name, **{**PRESETS[name], **given})


PRESETS: dict[ProtocolName, dict[str, Any]] = {
    # The released code's eval_imagenet.py and utils_ori.py: 50,000 samples as floats against 50,000 training images,
    # TensorFlow's resize_bilinear to 299, one split.
    "official": {
        "reference_count": 50_000, "feature_resize": "tf1-bilinear", "quantise": "none", "splits": 1,
    },
    # clean-fid's: images as a file would hold them, antialiased bicubic, all training images.
    "clean": {},
}  # fmt: skip


def check_metrics(metrics: Iterable[str], beside: Iterable[str] = ()) -> tuple[str, ...]:
    """Return `metrics` as a tuple; InputError if one of them is not in `METRICS`. `beside`: others that it offers."""
    metrics = tuple(metrics)
    if unknown := [name for name in metrics if name not in METRICS]:
        offered = {**dict.fromkeys(METRICS), **dict.fromkeys(beside)}
        hint = nearest(unknown[0], ["all", *offered])
        raise InputError(f"metrics must be all, or some of {','.join(offered)}, got {','.join(unknown)}{hint}")
    return metrics


def versions() -> dict[str, str]:
    """Return the versions of the packages that influence the scores."""
    packages = {name: version(name) for name in ("torch", "numpy", "pillow")}
    return {"sagan_fast": __version__, **packages, "python": platform.python_version()}
