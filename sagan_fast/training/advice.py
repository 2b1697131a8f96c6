"""Says in the log when a run does not look healthy, and what to try; docs/training.md explains the signs.

Nothing is stopped here: `health.Guard` decides what has diverged. Each sign is told once a run.
"""

from collections.abc import Callable, Mapping

from sagan_fast.training.config import TrainConfig
from sagan_fast.training.losses import LOSSES

PATIENCE = 5
"""Lines of the log in a row that show a sign before it is told."""
PAGE = "docs/training.md"


class Advice:
    """Watches the lines of the log of the run `config` for signs of trouble.

    - The discriminator is winning: its loss is under a tenth of what undecided scores give.
    - It cannot tell real from fake: their mean scores differ by less than a hundredth, after the first thousand steps.
    - Attention is not used: every gamma is under 0.001, after the first ten thousand steps.
    - Gradients are large: a norm is above a thousand.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.undecided = LOSSES[config.loss].undecided
        self.is_won_at_0 = LOSSES[config.loss].is_won_at_0
        self.lines: dict[str, int] = {}
        self.signs: dict[str, tuple[Callable[[int, Mapping[str, float]], bool], str]] = {
            "winning": (self._is_winning, "the discriminator is winning: its loss is near 0, and the generator learns "
                        "little from it; try a smaller --d-lr, --r1-gamma 1, or more images with --flip"),
            "blind": (self._is_blind, "the discriminator gives real and generated images nearly the same score: try a "
                      "larger --d-lr, or more channels for it"),
            "unused": (self._is_unused, "attention is not used yet: every gamma is under 0.001; this is usual in the "
                       "first steps, later it says that the networks do without"),
            "steep": (self._is_steep, "a gradient norm is above 1000: smaller --g-lr and --d-lr make the run steadier"),
        }  # fmt: skip

    def read(self, step: int, values: Mapping[str, float]) -> list[str]:
        """Return the sentences about signs that the line `values` of the log at `step` makes certain."""
        told = []
        for name, (applies, sentence) in list(self.signs.items()):
            self.lines[name] = self.lines.get(name, 0) + 1 if applies(step, values) else 0
            if self.lines[name] >= PATIENCE:
                del self.signs[name]
                told.append(f"note at step {step}: {sentence} ({PAGE})")
        return told

    def _is_winning(self, step: int, values: Mapping[str, float]) -> bool:
        return self.is_won_at_0 and values["d_loss"] < 0.1 * self.undecided

    def _is_blind(self, step: int, values: Mapping[str, float]) -> bool:
        return step > 1000 and abs(values["d_real"] - values["d_fake"]) < 0.01

    def _is_unused(self, step: int, values: Mapping[str, float]) -> bool:
        gammas = [abs(value) for name, value in values.items() if name.startswith("gamma/")]
        return step > 10_000 and bool(gammas) and max(gammas) < 0.001

    def _is_steep(self, step: int, values: Mapping[str, float]) -> bool:
        return max(values.get("grad_norm/d", 0.0), values.get("grad_norm/g", 0.0)) > 1000
