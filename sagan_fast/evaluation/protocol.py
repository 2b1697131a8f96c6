"""How a score was measured: re-scoring one checkpoint in another way moves FID by 4 to 5."""

from __future__ import annotations

import dataclasses
import platform
from typing import Any

import torch

import sagan_fast
from sagan_fast.errors import InputError
from sagan_fast.evaluation.features import RESIZES
from sagan_fast.evaluation.streams import BATCH_NORMS, QUANTISATIONS

METRICS = ("fid", "is", "kid", "prdc", "intra_fid")


@dataclasses.dataclass(frozen=True)
class Protocol:
    """Everything about a measurement that is chosen, not found; `PRESETS` has the two that are in use."""

    name: str = "clean"
    """the preset it came from"""
    count: int = 50_000
    """generated images"""
    reference_count: int | None = None
    """real images, a fixed random choice; all if not given"""
    feature_resize: str = "antialias-bicubic"
    """how images are resized for the features: tf1-bilinear or antialias-bicubic"""
    feature_size: int | None = None
    """to how many pixels a side; what the network was trained on if not given"""
    quantise: str = "uint8"
    """generated images: uint8, as in a PNG, or none"""
    splits: int = 10
    """parts whose inception scores are averaged"""
    batch_norm: str = "running"
    """statistics in the generator: running averages, of each batch, or standing (averaged anew before sampling)"""
    standing_batches: int = 200
    """batches that standing statistics are averaged over"""
    truncation: float | None = None
    """draw z within [-T, T]"""
    weights: str = "average"
    """of the generator: average (EMA) or last"""
    seed: int = 0
    """of the generated images and of the choice of real ones"""
    batch_size: int = 64
    """images at a time; matters to the scores for batch_norm batch and standing only"""
    kid_subsets: int = 100
    """subsets KID is averaged over"""
    kid_subset_size: int = 1000
    """images in each (all, if there are fewer)"""
    neighbours: int = 5
    """k of precision, recall, density and coverage"""
    keep: int = 10_000
    """images of either set that KID and precision to coverage are from; FID and IS are from all"""

    def __post_init__(self) -> None:
        for name in ("count", "splits", "standing_batches", "batch_size", "kid_subsets", "neighbours"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("count", "reference_count", "kid_subset_size", "keep"):
            value = getattr(self, name)
            if value is not None and value < 2:
                raise InputError(f"{name} must be at least 2, got {value}")
        for name, known in (
            ("feature_resize", RESIZES),
            ("quantise", QUANTISATIONS),
            ("batch_norm", BATCH_NORMS),
            ("weights", ("average", "last")),
        ):
            if getattr(self, name) not in known:
                raise InputError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if self.splits > self.count:
            raise InputError(f"splits must be at most the count, got {self.splits} for {self.count} images")

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> Protocol:
        """Return the protocol `name` of `PRESETS` with `overrides`; None in them means what the preset says."""
        if name not in PRESETS:
            raise InputError(f"protocol must be one of {', '.join(PRESETS)}, got {name!r}")
        given = {key: value for key, value in overrides.items() if value is not None}
        return cls(name=name, **{**PRESETS[name], **given})


PRESETS: dict[str, dict[str, Any]] = {
    # The released code's eval_imagenet.py and utils_ori.py: 50,000 samples as floats against 50,000 training images,
    # TensorFlow's resize_bilinear to 299, one split.
    "official": {
        "reference_count": 50_000, "feature_resize": "tf1-bilinear", "quantise": "none", "splits": 1,
    },
    # clean-fid's: images as a file would hold them, antialiased bicubic, all training images.
    "clean": {},
}  # fmt: skip


def versions() -> dict[str, str]:
    """Return the versions of all that touches the numbers."""
    import numpy as np
    import PIL

    return {
        "sagan_fast": sagan_fast.__version__,
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "pillow": PIL.__version__,
        "python": platform.python_version(),
    }
