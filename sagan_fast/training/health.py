"""Decides whether a run has diverged, and reads out gammas, sigmas and memory for the log."""

import copy
import math
import sys
from collections.abc import Mapping
from typing import Any

import torch

from sagan_fast.choices import Loss
from sagan_fast.errors import Diverged
from sagan_fast.layers.self_attention import SelfAttention2d
from sagan_fast.training.losses import LOSSES, PENALTIES
from sagan_fast.training.state import TrainState

WATCHED = ("d_loss", "g_loss", "d_real", "d_fake", "grad_norm/d", "grad_norm/g", *PENALTIES, "lecam")
"""Numbers of a log line that must be finite, where they are there."""
SEEN = ("lines_won", "lines_dead", "healthy_until", "sigmas")
"""What a guard has seen, as it is saved in checkpoints."""


class Guard:
    """Raises `Diverged` when a line of the log shows divergence.

    - A loss, penalty, score or gradient norm is NaN or infinite.
    - The discriminator has won: for `patience` lines in a row its loss is below `won`, so no network gets a gradient.
      Not with `loss` "wasserstein", which has no such end.
    - The discriminator has died: for `patience` lines in a row it gives real and fake images the same score within
      `dead`, with the loss of undecided scores, 2 for the hinge.
    - The largest sigma of a network is `growth` times what it was within the last `patience` lines.
    """

    def __init__(
        self, patience: int, won: float = 1e-3, dead: float = 1e-4, growth: float = 10.0, loss: Loss = "hinge"
    ) -> None:
        self.patience, self.dead, self.growth = patience, dead, growth
        self.won = won if LOSSES[loss].is_won_at_0 else -math.inf
        self.undecided = LOSSES[loss].undecided
        self.lines_won = self.lines_dead = 0
        self.healthy_until = 0
        self.sigmas: dict[str, list[float]] = {}

    def check(self, step: int, values: Mapping[str, float]) -> None:
        """Raise `Diverged` if the line `values` of the log at `step` says so; keys d_loss, g_loss, d_real, d_fake."""
        if sentence := self._fault(step, values):
            raise Diverged(sentence, self.healthy_until)
        if not self.lines_won and not self.lines_dead:
            self.healthy_until = step

    def _fault(self, step: int, values: Mapping[str, float]) -> str:
        for name in WATCHED:
            if not math.isfinite(values.get(name, 0.0)):
                return f"{name} is {values[name]} at step {step}"
        self.lines_won = self.lines_won + 1 if values["d_loss"] < self.won else 0
        same_score = abs(values["d_real"] - values["d_fake"]) < self.dead
        died = same_score and abs(values["d_loss"] - self.undecided) < self.dead
        self.lines_dead = self.lines_dead + 1 if died else 0
        if self.lines_won >= self.patience:
            return (
                f"the discriminator has won outright by step {step}: its loss was below {self.won} for "
                f"{self.patience} lines of the log in a row, so neither network learns any more"
            )
        if self.lines_dead >= self.patience:
            return (
                f"the discriminator has died by step {step}: it gave real and fake images the same score for "
                f"{self.patience} lines of the log in a row"
            )
        for name in ("sigma_max/g", "sigma_max/d"):
            if name not in values:
                continue
            recent = [*self.sigmas.get(name, []), values[name]][-self.patience :]
            self.sigmas[name] = recent
            if not recent[-1] <= self.growth * min(recent):
                return (
                    f"{name} grew from {min(recent):.3g} to {recent[-1]:.3g} in {len(recent)} log lines by step {step}"
                )
        return ""

    def state_dict(self) -> dict[str, Any]:
        """Return what was seen so far."""
        return copy.deepcopy({name: getattr(self, name) for name in SEEN})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned; from an empty mapping, start anew."""
        vars(self).update(copy.deepcopy({**Guard(self.patience).state_dict(), **state}))


def network_values(state: TrainState) -> tuple[dict[str, float], dict[str, float]]:
    """Return the values of both networks for the log, and sigma of every weight for the curves.

    The first: gamma of every attention block, the largest sigma of each network, steps skipped under fp16. Three
    transfers from the device.
    """
    networks = (("g", state.generator, state.g_spectral), ("d", state.discriminator, state.d_spectral))
    gammas = {
        f"gamma/{letter}.{name}": module.gamma.detach().reshape(())
        for letter, network, _ in networks
        for name, module in network.named_modules()
        if isinstance(module, SelfAttention2d)
    }
    values = dict(zip(gammas, torch.stack([*gammas.values()]).tolist(), strict=True)) if gammas else {}
    sigmas: dict[str, float] = {}
    for letter, _, group in networks:
        found = group.sigmas()
        sigmas |= {f"sigma/{letter}.{name}": sigma for name, sigma in found.items()}
        values[f"sigma_max/{letter}"] = float(max(found.values(), key=lambda sigma: (math.isnan(sigma), sigma)))
    values |= {"skipped_steps/g": state.g_scaler.skipped, "skipped_steps/d": state.d_scaler.skipped}
    return values, sigmas


def memory_gib(device: torch.device) -> float:
    """Return the peak memory in GiB, of the device if it is CUDA, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)
