"""The networks of a checkpoint, held in memory, and what the page asks of them: samples, paths, attention."""

from __future__ import annotations

import io
import itertools
import math
import re
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sagan_fast.data.images import BrokenImageError, image_size, read_image
from sagan_fast.errors import InputError
from sagan_fast.evaluation.evaluate import generator_source
from sagan_fast.evaluation.sampling import class_name, latents, mixed_classes, sample, slerp, truncated
from sagan_fast.models.checkpoint import load_discriminator
from sagan_fast.models.discriminator import Discriminator
from sagan_fast.models.generator import is_exported
from sagan_fast.visualize import drawing
from sagan_fast.visualize.attention_figure import NEARLY_EVEN
from sagan_fast.visualize.attention_maps import (
    SMALL_GAMMA,
    attention_input,
    attention_layer,
    attention_layers,
    centre_of,
    heat,
    on_picture,
    positions_at,
    rows_of,
)
from sagan_fast.visualize.grids import to_uint8

PER_SEED = 64
"""z drawn for a seed. A sample is one of them, whatever else is shown."""
COLUMNS = 8
MOST = 80
"""Samples at a time, on a machine that is fast enough."""
BUDGET = 0.2
"""Seconds for them."""
KEPT = 16
"""Pictures and inputs of attention layers that are remembered."""
PANEL = 320
"""Least width of an attention map in pixels."""
_SAMPLE = re.compile(r"(\d{1,6}|-)\.(\d{1,10})\.(\d{1,2})")
_REAL = re.compile(r"real\.(\d{1,9})")


@dataclass(frozen=True)
class Chosen:
    """A sample: the z number `index` of `seed`, and a class, None for an unconditional model."""

    class_id: int | None
    seed: int
    index: int

    def __str__(self) -> str:
        return f"{'-' if self.class_id is None else self.class_id}.{self.seed}.{self.index}"


@dataclass(frozen=True)
class Seen:
    """A picture as a network saw it: uint8 (3, R, R), the input (1, C, H, W) of an attention layer, the score of D."""

    picture: Tensor
    x: Tensor
    score: float | None


class Model:
    """The EMA generator (averaged weights) and the discriminator of `source`, a run, checkpoint or exported folder.

    Not safe for several threads at once. Raises InputError if there is no checkpoint, or it cannot be read.
    """

    def __init__(self, source: Path, device: torch.device) -> None:
        self.device = device
        self.generator, about = generator_source(source, "average", str(device))
        self.step: int | None = about.get("step")
        self.discriminator: Discriminator | None = None
        if not is_exported(source):
            self.discriminator = load_discriminator(source, device=str(device))
        self.layers = {
            letter: list(attention_layers(network))
            for letter, network in (("g", self.generator), ("d", self.discriminator))
            if network is not None
        }
        self._real: OrderedDict[str, Tensor] = OrderedDict()
        self._seen: OrderedDict[tuple[Any, ...], Seen] = OrderedDict()
        self._numbers = itertools.count(1)
        self.at_a_time = self._affordable()

    def about(self) -> dict[str, Any]:
        """Return what the page must know: step, sizes, names of the classes, attention layers."""
        config = self.generator.config
        return {
            "step": self.step,
            "resolution": config.resolution,
            "classes": [class_name(self.generator.class_names, i) for i in range(config.num_classes)],
            "rows": max(1, min(self.at_a_time // COLUMNS, config.num_classes or self.at_a_time)),
            "columns": min(COLUMNS, self.at_a_time),
            "layers": self.layers,
        }

    def samples(self, class_ids: Sequence[int | None], columns: int, seed: int, truncation: float | None) -> list[Any]:
        """Return (Chosen, uint8 image (3, R, R)) for `columns` samples of each class, the same z for every class.

        A class of None gives further z of the seed instead. Raises InputError for a class that there is not.
        """
        chosen = [Chosen(k, seed, i) for k in class_ids for i in range(columns)]
        if chosen and chosen[0].class_id is None:
            chosen = [Chosen(None, seed, i) for i in range(len(chosen))]
        return list(zip(chosen, self._images(chosen, truncation), strict=True))

    def between(self, start: str, end: str, frames: int, truncation: float | None) -> Tensor:
        """Return uint8 images (frames, 3, R, R) on the way from one sample to the other, along an arc of z.

        Where their classes differ, the class goes over too. Raises InputError for samples that there are not.
        """
        ends = [self._chosen(start), self._chosen(end)]
        share = torch.linspace(0, 1, frames)
        z = slerp(self._z(ends[:1], truncation), self._z(ends[1:], truncation), share)[0]
        y = None
        if self.generator.config.num_classes:
            a, b = (torch.tensor([one.class_id]) for one in ends)
            y = mixed_classes(a, b, share, self.generator.config.num_classes)[0]
        return to_uint8(torch.cat(list(sample(self.generator, z, y))))

    def keep(self, content: bytes) -> tuple[str, Tensor, str]:
        """Return a name for the image in the file `content`, its pixels (3, R, R), and a sentence about both.

        It is cropped and resized as the training does. Raises InputError if it is no image.
        """
        if self.discriminator is None:
            raise InputError("an exported generator has no discriminator to look at a real image")
        size = self.discriminator.config.resolution
        try:
            picture = read_image(io.BytesIO(content), size)
        except BrokenImageError as error:
            raise InputError(f"the file cannot be shown: {error}") from error
        width, height = image_size(io.BytesIO(content)) or (size, size)  # type: ignore[arg-type]
        name = f"real.{next(self._numbers)}"
        _remember(self._real, name, picture)
        same = (width, height) == (size, size)
        said = "" if same else f", cropped to its centre and resized to {size} x {size} as in training"
        return name, picture, f"{width} x {height} pixels{said}"

    def attention(
        self, network: str, layer: str | None, name: str, class_id: int, truncation: float | None, x: float, y: float
    ) -> dict[str, Any]:
        """Return where the point (`x`, `y`) of a picture attends: uint8 "picture" and "map", and numbers about it.

        `network` is "g" or "d"; `name` that of a sample, or for "d" of a real image, which is scored as of
        `class_id`. Only the row of this one query is computed. Raises InputError for what there is not.
        """
        if network not in ("g", "d"):
            raise InputError(f"network must be g or d, got {network[:40]!r}")
        shown = self.generator if network == "g" else self.discriminator
        if shown is None:
            raise InputError("an exported generator has no discriminator: choose the generator")
        layer_name, module = attention_layer(shown, layer or None)
        key = (network, layer_name, name, class_id if _REAL.fullmatch(name) else None, truncation)
        seen = self._seen.get(key)
        if seen is None:
            seen = self._look(network, module, name, class_id, truncation)
            _remember(self._seen, key, seen)
        size = (seen.x.shape[2], seen.x.shape[3])
        query = positions_at([(x, y)], size, seen.picture.shape[-1])[0]
        row = rows_of(module, seen.x, [query]).cpu()
        peak = row.amax() * row.shape[1]
        numbers = (peak, module.gamma, 0.0 if seen.score is None else seen.score)
        if not all(math.isfinite(number) for number in numbers):
            which = "generator" if network == "g" else "discriminator"
            raise InputError(f"the {which} gives numbers that are not finite: its weights have diverged")
        big = drawing.enlarged(seen.picture, PANEL)
        warmth = heat(on_picture(row, size, module.pool, *big.shape[1:]), peak[None])[0]
        lit, at = drawing.lit(big, warmth, drawing.COLOURS[0]), centre_of(query, size, *big.shape[1:])
        half = int((row[0].sort(descending=True).values.cumsum(0) < 0.5).sum()) + 1
        place = centre_of(query, size, *seen.picture.shape[1:])
        return {
            "picture": big,
            "map": drawing.with_dot(lit, *at, drawing.COLOURS[0], PANEL / 40),
            "x": place[0], "y": place[1], "cells": size[0], "layer": layer_name,
            "peak": float(peak), "half": half / row.shape[1], "even": bool(peak < NEARLY_EVEN),
            "gamma": float(module.gamma), "small": abs(float(module.gamma)) < SMALL_GAMMA, "score": seen.score,
        }  # fmt: skip

    def latent(self, seed: int, index: int) -> Tensor:
        """Return z (z_dim,) number `index` of `seed`, untruncated."""
        return self._z([Chosen(None, seed, index)], None)[0]

    def chosen_class(self, number: int | None) -> int | None:
        """Return the class `number`; InputError if the model does not have it."""
        known = self.generator.config.num_classes
        if number is not None and not 0 <= number < known:
            raise InputError(f"class must be 0 to {known - 1}, got {number}" if known else "the model has no classes")
        return number

    def _look(self, network: str, module: Any, name: str, class_id: int, truncation: float | None) -> Seen:
        """Run a network on the picture `name`, for what `module` sees of it."""
        labels = None
        if _REAL.fullmatch(name):
            if network == "g":
                raise InputError("a real image has no place in the generator: choose the discriminator")
            if name not in self._real:
                raise InputError("that image is no longer kept: drop it again")
            picture = self._real[name]
            if self.generator.config.num_classes:
                labels = torch.tensor([self.chosen_class(class_id)], device=self.device)
        else:
            one = self._chosen(name)
            labels = None if one.class_id is None else torch.tensor([one.class_id], device=self.device)
            if network == "g":
                z = self._z([one], truncation).to(self.device)
                x, image = attention_input(self.generator, module, z, labels)
                return Seen(to_uint8(image)[0], x, None)
            picture = self._images([one], truncation)[0]
        image = picture[None].to(self.device).float() / 127.5 - 1
        assert self.discriminator is not None
        x, score = attention_input(self.discriminator, module, image, labels)
        return Seen(picture, x, float(score))

    def _images(self, chosen: Sequence[Chosen], truncation: float | None) -> Tensor:
        y = None
        if chosen and chosen[0].class_id is not None:
            y = torch.tensor([self.chosen_class(one.class_id) for one in chosen])
        images = sample(self.generator, self._z(chosen, truncation), y, MOST)
        return to_uint8(torch.cat(list(images)))

    def _z(self, chosen: Sequence[Chosen], truncation: float | None) -> Tensor:
        """Return z (len(chosen), z_dim): the same draws at every truncation, more or less typical."""
        z_dim = self.generator.config.z_dim
        drawn = {seed: latents(PER_SEED, z_dim, seed) for seed in {one.seed for one in chosen}}
        return truncated(torch.stack([drawn[one.seed][one.index] for one in chosen]), truncation)

    def _chosen(self, text: str) -> Chosen:
        """Return the sample that `text` names, CLASS.SEED.INDEX with "-" for no class; InputError for other texts."""
        found = _SAMPLE.fullmatch(text)
        if not found or int(found[3]) >= PER_SEED:
            raise InputError(f"a sample must be named like 3.0.5 (class, seed, number), got {text!r}")
        class_id = None if found[1] == "-" else int(found[1])
        if (class_id is None) != (self.generator.config.num_classes == 0):
            raise InputError(f"sample {text} must {'have a class' if class_id is None else 'have no class: write -'}")
        return Chosen(self.chosen_class(class_id), int(found[2]), int(found[3]))

    def _affordable(self) -> int:
        """Return how many samples take BUDGET seconds here, 4 to MOST."""
        one, count = Chosen(0 if self.generator.config.num_classes else None, 0, 0), COLUMNS
        self._images([one] * 2, None)  # warms up
        while (seconds := self._seconds([one] * count)) < BUDGET / 2 and count < MOST:
            count = min(2 * count, MOST)  # a larger batch is faster for each image
        count = int(BUDGET * count / seconds)
        return max(4, min(MOST, count if count < COLUMNS else count // COLUMNS * COLUMNS))

    def _seconds(self, chosen: Sequence[Chosen]) -> float:
        """Return how long `chosen` take: the shorter of two times, since other programs may run."""
        times = [time.perf_counter()]
        for _ in range(2):
            self._images(chosen, None)
            times.append(time.perf_counter())
        return min(times[1] - times[0], times[2] - times[1])


def _remember(kept: OrderedDict[Any, Any], key: Any, value: Any) -> None:
    kept[key] = value
    while len(kept) > KEPT:
        kept.popitem(last=False)
