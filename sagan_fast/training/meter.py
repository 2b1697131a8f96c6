"""Sums the measurements of the steps between two lines of the log."""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from sagan_fast.data import ImageDataset
from sagan_fast.distributed import World
from sagan_fast.training.config import TrainConfig
from sagan_fast.training.health import memory_gib, network_values
from sagan_fast.training.state import TrainState


class Meter:
    """Sums the measurements of each step on the device, which waits only when the log is written."""

    def __init__(self, config: TrainConfig, world: World) -> None:
        self.config, self.world = config, world
        self.sums: dict[tuple[str, ...], torch.Tensor] = {}
        self.counts: Counter[tuple[str, ...]] = Counter()
        self.restart()

    def restart(self) -> None:
        """Start the clock."""
        self.began, self.waited = time.perf_counter(), 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Return the context within which the run waits for images."""
        began = time.perf_counter()
        yield
        self.waited += time.perf_counter() - began

    @property
    def steps(self) -> int:
        """Number of steps since the last line of the log."""
        return self.counts.total()

    def add(self, values: dict[str, torch.Tensor]) -> None:
        """Add the numbers of a step; a name that a step does not have is left out of that name's mean."""
        names = tuple(values)
        mine = torch.stack([value.float() for value in values.values()])
        self.sums[names] = self.sums[names] + mine if names in self.sums else mine
        self.counts[names] += 1

    def read(self, state: TrainState, dataset: ImageDataset) -> tuple[dict[str, float], dict[str, float]]:
        """Return the means over steps and processes since the last call, and the values for TensorBoard only."""
        names = [name for some in self.sums for name in some]
        sums = torch.cat(list(self.sums.values())).tolist()
        seconds = time.perf_counter() - self.began
        mine = [*sums, float(dataset.num_broken), self.waited / seconds, memory_gib(self.world.device)]
        *columns, waits, memories = zip(*self.world.gather(mine), strict=True)
        *totals, broken = map(sum, columns)
        values: dict[str, float] = dict.fromkeys(names, 0.0)
        for name, total in zip(names, totals, strict=True):
            values[name] += total
        for name in values:
            values[name] /= self.world.size * sum(count for some, count in self.counts.items() if name in some)
        values["images_per_s"] = self.steps * self.config.batch_size / seconds
        values |= {"loader_wait": round(max(waits), 4), "memory_gib": round(max(memories), 3)}
        networks, curves = network_values(state)
        values |= networks
        values |= {"broken_images": int(broken), "rollbacks": state.rollbacks}
        self.sums, self.counts = {}, Counter()
        return values, curves
