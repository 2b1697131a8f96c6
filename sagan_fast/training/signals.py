"""Stops a run on SIGINT (a terminal) or SIGTERM (a scheduler), all processes at the same step."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from sagan_fast.distributed import World

IMPATIENCE = 1.0
"""Seconds. A second SIGINT sooner than this is an echo: the terminal signals every process of a run, and so does
torchrun."""


@contextmanager
def stop_on_signals() -> Iterator[list[int]]:
    """Yield a list that a first SIGINT or SIGTERM is appended to; a later SIGINT interrupts at once."""
    received: list[int] = []
    first = 0.0

    def note(number: int, _frame: object) -> None:
        nonlocal first
        now = time.monotonic()
        if not received:
            first = now
        elif number == signal.SIGINT and now - first > IMPATIENCE:
            raise KeyboardInterrupt
        received.append(number)

    try:
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: the caller handles signals
        yield received
        return
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class StopVote:
    """Lets all processes stop at the same step when one of them was told to.

    Each call takes this process' wish and returns whether any process wished it at the call before. The answer travels
    while the step is computed, so that nothing waits for it. Alone, the wish is granted at once.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.pending: tuple[Any, torch.Tensor] | None = None

    def __call__(self, wish: bool) -> bool:
        if self.world.size == 1:
            return wish
        granted = self.settle()
        flag = torch.tensor([int(wish)], dtype=torch.int32)
        self.pending = dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.world.control, async_op=True), flag
        return granted

    def settle(self) -> bool:
        """Wait for the answer under way, if there is one, and return it."""
        if self.pending is None:
            return False
        work, flag = self.pending
        self.pending = None
        work.wait()
        return bool(flag.item())
