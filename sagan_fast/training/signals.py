"""Stops a run on SIGINT (a terminal) or SIGTERM (a scheduler), all processes at the same step."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from sagan_fast.distributed import World

IMPATIENCE = 1.0
"""Seconds. A second SIGINT sooner than this is an echo: the terminal signals every process of a run, and so does
torchrun."""


class Stop(list[int]):
    """The signals received so far. The first is answered with the sentence `answer`, and the work ends when it can.

    A later SIGINT raises KeyboardInterrupt, and one more ends the process. Without an `answer` a first SIGINT is passed
    to the handler from before; but several processes, which may be in a collective, only note it.
    """

    def __init__(self, answer: str, before: Any = None) -> None:
        super().__init__()
        self.answer, self.before = answer, before
        self.first = 0.0
        self.ending = False

    def note(self, number: int, frame: FrameType | None) -> None:
        """Take note of the signal `number`: the handler."""
        now, is_first = time.monotonic(), not self
        self.append(number)
        if is_first:
            self.first = now
            if self.answer:
                _say(self.answer)
            elif number == signal.SIGINT and os.environ.get("WORLD_SIZE", "1") == "1":
                self._end(number, frame)
        elif number == signal.SIGINT and now - self.first > IMPATIENCE:
            self._end(number, frame)

    def _end(self, number: int, frame: FrameType | None) -> None:
        if self.ending:
            os._exit(128 + number)  # files are whole at any moment
        self.ending = True
        if callable(self.before):
            self.before(number, frame)
        raise KeyboardInterrupt


def _say(sentence: str) -> None:
    """Print a line on stderr from a signal handler, over a progress bar if there is one."""
    if not int(os.environ.get("RANK", "0")):
        start = "\r\033[2K" if sys.stderr.isatty() else ""
        os.write(2, f"{start}{sentence}\n".encode())  # `print` may be in the midst of a line


@contextmanager
def stop_on_signals(answer: str = "") -> Iterator[Stop]:
    """Yield a list that SIGINT and SIGTERM are appended to, instead of what they do otherwise; see `Stop`."""
    received = Stop(answer, signal.getsignal(signal.SIGINT))
    try:
        before = {number: signal.signal(number, received.note) for number in (signal.SIGINT, signal.SIGTERM)}
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
