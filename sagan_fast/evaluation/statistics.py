"""Collects the statistics of a set of images that the scores need, and caches those of real images.

A set of any size is reduced to two moments and a bounded subset of features. Only the features of one class at a time
are held in memory. Statistics of real sets are cached on disk, under a key of everything that affects them.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sagan_fast.data.loader import epoch_order
from sagan_fast.distributed import current_world
from sagan_fast.evaluation.features import Extractor
from sagan_fast.evaluation.metrics import Gaussian, InceptionScore, Moments
from sagan_fast.evaluation.streams import Images, features_in_order
from sagan_fast.files import WRITING, explained, move, reason

CLASS_CAP = 5000
"""Images of a class that count for its FID; those after are left out. All features of a class are in memory at once."""
FORMAT = 1


@dataclass(frozen=True)
class SetStatistics:
    """Statistics of `count` images: the Gaussian of all features, and `kept`, float32 features (n, F) of some."""

    count: int
    gaussian: Gaussian
    kept: Tensor


def collect(
    images: Images,
    extractor: Extractor,
    *,
    keep: int,
    on_class: Callable[[int, int, Gaussian], None] | None = None,
    inception: InceptionScore | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> SetStatistics | None:
    """Go through `images` once and return their statistics; None except on the first process.

    Args:
        keep: features kept: all if there are no more, else those of a fixed random choice.
        on_class: called with label, count and Gaussian when a class (of two images or more) is complete.
        inception: is shown all logits.
        progress: is told the number of images of each batch.
    """
    is_main = current_world(extractor.device).is_main
    moments = Moments(extractor.num_features, extractor.device) if is_main else None
    wanted = torch.zeros(images.count, dtype=torch.bool)
    wanted[torch.from_numpy(epoch_order(images.count, 0, 0)[:keep])] = True
    kept: list[Tensor] = []
    remaining = torch.bincount(images.labels, minlength=max(images.num_classes, 1)).tolist()
    rows: dict[int, list[Tensor]] = {}
    for start, features, logits in features_in_order(images, extractor):
        progress(len(features))
        if moments is None:
            continue
        samples = slice(start, start + len(features))
        moments.update(features)
        kept.append(features[wanted[samples].to(features.device)].clone())
        if inception is not None:
            inception.update(start, logits)
        if on_class is None or not images.num_classes:
            continue
        labels = images.labels[samples]
        for label in torch.unique(labels).tolist():
            of_class = features[(labels == label).to(features.device)]
            rows.setdefault(label, []).append(of_class)
            remaining[label] -= len(of_class)
            if remaining[label] == 0:
                everything = torch.cat(rows.pop(label))[:CLASS_CAP]
                if len(everything) > 1:
                    on_class(label, len(everything), Gaussian.of_rows(everything))
    if moments is None:
        return None
    return SetStatistics(moments.count, moments.gaussian(), torch.cat(kept))


class Reference:
    """Statistics of a real set, read from the cache, or else collected and written to it.

    `identity` is plain data that says all that decides the numbers. `from_cache` tells which it was. Every process of
    a distributed evaluation makes one; the first alone has `statistics`, the others None.
    """

    def __init__(
        self,
        identity: Mapping[str, Any],
        images: Callable[[], Images],
        extractor: Extractor,
        *,
        keep: int,
        per_class: bool,
        progress: Callable[[int], None] = lambda done: None,
    ) -> None:
        self.identity = {"format": FORMAT, "keep": keep, "per_class": per_class, **identity}
        text = json.dumps(self.identity, sort_keys=True)
        self.folder = cache_folder() / "reference" / hashlib.sha256(text.encode()).hexdigest()[:32]
        self.device = extractor.device
        world = current_world(extractor.device)
        self.statistics = self._load(text) if world.is_main else None
        self.from_cache = world.from_main(lambda: self.statistics is not None)
        if self.from_cache:
            return
        # Made before the work and not after it, so that a place that cannot be written shows at once.
        temporary = Path(world.from_main(self._temporary_folder))
        failures: list[OSError] = []

        def save_class(label: int, count: int, gaussian: Gaussian) -> None:
            content = {"count": count, "mean": gaussian.mean.cpu(), "factor": gaussian.factor.float().cpu()}
            try:
                torch.save(content, temporary / f"class_{label:06d}.pt")
            except WRITING as error:  # the other processes are in the midst of it: later
                failures.append(OSError(reason(error)))

        on_class = save_class if per_class else None
        try:
            self.statistics = collect(images(), extractor, keep=keep, on_class=on_class, progress=progress)
            world.from_main(lambda: self._keep(temporary, text, failures))
        finally:
            if world.is_main:
                shutil.rmtree(temporary, ignore_errors=True)

    def of_class(self, label: int) -> tuple[int, Gaussian] | None:
        """Return the number of images and the Gaussian of class `label`; None if it has fewer than two."""
        path = self.folder / f"class_{label:06d}.pt"
        if not path.exists():
            return None
        content = torch.load(path, map_location=self.device, weights_only=True)
        return content["count"], Gaussian(content["mean"], content["factor"].double())

    def _load(self, text: str) -> SetStatistics | None:
        try:
            if (self.folder / "identity.json").read_text() != text:
                return None
            content = torch.load(self.folder / "set.pt", map_location=self.device, weights_only=True)
            return SetStatistics(content["count"], Gaussian(content["mean"], content["factor"]), content["kept"])
        except Exception:  # missing, or cut off in any way: it is made anew
            return None

    def _temporary_folder(self) -> str:
        with self._writing():
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            return tempfile.mkdtemp(dir=self.folder.parent, prefix=".")

    def _keep(self, temporary: Path, text: str, failures: list[OSError]) -> None:
        found = self.statistics
        assert found is not None
        with self._writing():
            for failure in failures:
                raise failure
            mean, factor = found.gaussian.mean.cpu(), found.gaussian.factor.cpu()
            content = {"count": found.count, "mean": mean, "factor": factor, "kept": found.kept.cpu()}
            torch.save(content, temporary / "set.pt")
            (temporary / "identity.json").write_text(text)
            shutil.rmtree(self.folder, ignore_errors=True)  # damaged, or another process has just written the same
            move(temporary, self.folder)

    def _writing(self) -> AbstractContextManager[None]:
        what = f"cannot keep the statistics of the real images in {self.folder.parent}"
        return explained(what, "; set SAGAN_FAST_CACHE to a folder that can be written", WRITING)


def cache_folder() -> Path:
    """Return $SAGAN_FAST_CACHE, or ~/.cache/sagan_fast."""
    return Path(os.environ.get("SAGAN_FAST_CACHE") or Path("~", ".cache", "sagan_fast")).expanduser()
