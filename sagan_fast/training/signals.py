"""Being asked to stop: SIGINT from a terminal, SIGTERM from a scheduler."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

IMPATIENCE = 1.0
"""Seconds. A second SIGINT sooner than this is an echo: the terminal signals every process of a run, and so does
torchrun."""


@contextmanager
def stop_on_signals() -> Iterator[list[int]]:
    """Yield a list that a first SIGINT or SIGTERM is appended to; a SIGINT later on interrupts at once."""
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
