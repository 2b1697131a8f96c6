"""One training step: the discriminator, then the generator, one update each (Zhang et al. 2019, §4)."""

from __future__ import annotations

import torch
from torch import Tensor

from sagan_fast.training.config import TrainConfig
from sagan_fast.training.ema import update_ema
from sagan_fast.training.losses import discriminator_hinge, generator_hinge
from sagan_fast.training.state import TrainState


class Noise:
    """All that is random in step `step`, drawn on the CPU from (seed, step) alone: the same after any interruption."""

    def __init__(self, config: TrainConfig, step: int, device: torch.device) -> None:
        self.config, self.device = config, device
        self.rng = torch.Generator().manual_seed(((config.seed + 1) * 0x9E3779B97F4A7C15 + step) % 2**63)

    def latent(self) -> Tensor:
        """Return z (B, z_dim), normal."""
        z = torch.randn(self.config.batch_size, self.config.generator.z_dim, generator=self.rng)
        return z.to(self.device, non_blocking=True)

    def classes(self) -> Tensor | None:
        """Return y (B,), uniform over the classes, whatever the real batch holds; None if there are none."""
        if self.config.num_classes == 0:
            return None
        y = torch.randint(self.config.num_classes, (self.config.batch_size,), generator=self.rng)
        return y.to(self.device, non_blocking=True)

    def flips(self) -> Tensor:
        """Return (B,) booleans: which images to mirror."""
        return (torch.rand(self.config.batch_size, generator=self.rng) < 0.5).to(self.device, non_blocking=True)


def prepare_batch(images: Tensor, labels: Tensor, noise: Noise) -> tuple[Tensor, Tensor | None]:
    """Return images (B, 3, R, R) as floats in [-1, 1] and labels (B,), on the device, flipped if the run says so."""
    device = noise.device
    pixels = images.to(device, non_blocking=True).float() * (2.0 / 255.0) - 1.0
    if noise.config.flip:
        pixels = torch.where(noise.flips()[:, None, None, None], pixels.flip(3), pixels)
    if device.type == "cuda":
        pixels = pixels.contiguous(memory_format=torch.channels_last)
    return pixels, labels.to(device, non_blocking=True) if noise.config.num_classes else None


def train_step(
    state: TrainState, config: TrainConfig, images: Tensor, labels: Tensor, device: torch.device
) -> dict[str, Tensor]:
    """Do one step on `images` (B, 3, R, R) uint8 and `labels` (B,); return the mean losses and scores, on the device.

    Keys: d_loss, g_loss, d_real and d_fake (mean logits of the discriminator's update).
    """
    noise = Noise(config, state.step, device)
    real, y_real = prepare_batch(images, labels, noise)
    values = {**discriminator_step(state, real, y_real, noise), **generator_step(state, noise)}
    state.step += 1
    update_ema(state.ema, state.generator, config.ema_decay, state.step)
    return values


def discriminator_step(state: TrainState, real: Tensor, y_real: Tensor | None, noise: Noise) -> dict[str, Tensor]:
    """Update the discriminator on real and fake images in one forward."""
    y_fake = noise.classes()
    y = None if y_real is None or y_fake is None else torch.cat([y_real, y_fake])
    with state.precision.autocast():
        with torch.no_grad():
            fake = state.generator(noise.latent(), y_fake)
        scores = state.discriminator(torch.cat([real, fake.to(real.dtype)]), y)
    d_real, d_fake = scores.split([len(real), len(fake)])
    loss = discriminator_hinge(d_real, d_fake)
    state.d_scaler.update_with(loss, state.d_optimizer)
    state.d_spectral.step()
    return {"d_loss": loss.detach(), "d_real": d_real.detach().float().mean(), "d_fake": d_fake.detach().float().mean()}


def generator_step(state: TrainState, noise: Noise) -> dict[str, Tensor]:
    """Update the generator through the discriminator, whose weights want no gradient meanwhile."""
    y = noise.classes()
    state.discriminator.requires_grad_(False)
    with state.precision.autocast():
        scores = state.discriminator(state.generator(noise.latent(), y), y)
    loss = generator_hinge(scores)
    state.g_scaler.update_with(loss, state.g_optimizer)
    state.g_spectral.step()
    state.discriminator.requires_grad_(True)
    return {"g_loss": loss.detach()}
