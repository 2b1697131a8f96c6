"""Sums the measurements of the steps between two lines of the log."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from sagan_fast.data import ImageDataset
from sagan_fast.distributed import World
from sagan_fast.training.config import TrainConfig
from sagan_fast.training.health import memory_gib, network_values
from sagan_fast.training.state import TrainState

SUMMED = ("d_loss", "g_loss", "d_real", "d_fake", "grad_norm/d", "grad_norm/g")


class Meter:
    """Sums the measurements of each step on the device, which waits only when the log is written."""

    def __init__(self, config: TrainConfig, world: World) -> None:
        self.config, self.world = config, world
        self.sums: torch.Tensor | None = None
        self.steps = 0
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

    def add(self, values: dict[str, torch.Tensor]) -> None:
        """Add the numbers of a step."""
        mine = torch.stack([values[name].float() for name in SUMMED])
        self.sums = mine if self.sums is None else self.sums + mine
        self.steps += 1

    def read(self, state: TrainState, dataset: ImageDataset) -> tuple[dict[str, float], dict[str, float]]:
        """Return the means over steps and processes since the last call, and the values for TensorBoard only."""
        assert self.sums is not None
        sums = (self.sums / self.steps).tolist()
        seconds = time.perf_counter() - self.began
        mine = [*sums, float(dataset.num_broken), self.waited / seconds, memory_gib(self.world.device)]
        *columns, waits, memories = zip(*self.world.gather(mine), strict=True)
        *means, broken = map(sum, columns)
        values = {name: mean / self.world.size for name, mean in zip(SUMMED, means, strict=True)}
        values["images_per_s"] = self.steps * self.config.batch_size / seconds
        values |= {"loader_wait": round(max(waits), 4), "memory_gib": round(max(memories), 3)}
        networks, curves = network_values(state)
        values |= networks
        values |= {"broken_images": int(broken), "rollbacks": state.rollbacks}
        self.sums, self.steps = None, 0
        return values, curves
