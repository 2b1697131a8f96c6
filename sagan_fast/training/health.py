"""Whether a run is worth going on with: numbers that are not finite, a discriminator that has won or died."""

from __future__ import annotations

import math
from collections.abc import Mapping


class Diverged(RuntimeError):
    """Training has nowhere to go from here; the message says in a sentence what was seen."""


class Guard:
    """Looks at each line of the log and raises `Diverged`.

    At once for a loss or score that is NaN or infinite; after `patience` lines in a row in which the discriminator's
    loss is below `won` (its hinge is satisfied everywhere: no gradient reaches either network) or its scores on real
    and fake images differ by less than `dead` while its loss stands at 2 (it gives every image the same score).
    """

    def __init__(self, patience: int, won: float = 1e-3, dead: float = 1e-4) -> None:
        self.patience, self.won, self.dead = patience, won, dead
        self.lines_won = self.lines_dead = 0

    def check(self, step: int, values: Mapping[str, float]) -> None:
        """Raise `Diverged` if the line `values` of the log at `step` says so; keys d_loss, g_loss, d_real, d_fake."""
        for name in ("d_loss", "g_loss", "d_real", "d_fake"):
            if not math.isfinite(values[name]):
                raise Diverged(f"{name} is {values[name]} at step {step}")
        self.lines_won = self.lines_won + 1 if values["d_loss"] < self.won else 0
        same_score = abs(values["d_real"] - values["d_fake"]) < self.dead and abs(values["d_loss"] - 2.0) < self.dead
        self.lines_dead = self.lines_dead + 1 if same_score else 0
        if self.lines_won >= self.patience:
            raise Diverged(
                f"the discriminator has won outright by step {step}: its loss was below {self.won} for "
                f"{self.patience} lines of the log in a row, so neither network learns any more"
            )
        if self.lines_dead >= self.patience:
            raise Diverged(
                f"the discriminator has died by step {step}: it gave real and fake images the same score for "
                f"{self.patience} lines of the log in a row"
            )
