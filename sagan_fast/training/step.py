"""One training step: the discriminator, then the generator, one update each (Zhang et al. 2019, §4).

A step is one function of the global batch, for any number of processes and micro-batches. Noise and labels are drawn
for the whole batch from (seed, step). Process r of W takes the samples r, r + W, ...; its micro-batch a of k takes
every k-th of them from a on. Gradients and losses are means over all. Only batch norm depends on the division: its
batches are the micro-batches, which are the same for any number of processes with the same micro-batch size.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sagan_fast.distributed import World
from sagan_fast.training.config import TrainConfig
from sagan_fast.training.state import TrainState

LANE = 256
"""Samples of a batch that are drawn together: a process of many draws little more than its own."""


class Noise:
    """The random numbers of step `step`, drawn on the CPU from the seed, the step and the number of rollbacks.

    They are the same after any interruption and with any number of processes; each process draws its own samples.
    Sample p of a batch comes from lane p mod L; each lane has its own generator, for at least LANE samples.
    """

    def __init__(
        self, config: TrainConfig, step: int, device: torch.device, world: World | None = None, rollbacks: int = 0
    ) -> None:
        self.config, self.device = config, device
        self.world = world or World(device)
        self.parts = config.micro_batches(self.world.size)
        lanes = 1
        while config.batch_size % (2 * lanes) == 0 and config.batch_size // (2 * lanes) >= LANE:
            lanes *= 2
        mixed = (config.seed + 1) * 0x9E3779B97F4A7C15 + rollbacks * 0xD1B54A32D192ED03 + step
        self.lanes = lanes
        self.places = torch.arange(self.world.rank, config.batch_size, self.world.size)
        self.rngs = {
            lane: torch.Generator().manual_seed((mixed + lane * 0xBF58476D1CE4E5B9) % 2**63)
            for lane in torch.unique(self.places % lanes).tolist()
        }

    def latent(self) -> Tensor:
        """Return z (B, z_dim), normal, for the B images of this process."""
        width = self.config.generator.z_dim
        return self._mine(lambda count, rng: torch.randn(count, width, generator=rng))

    def classes(self) -> Tensor | None:
        """Return y (B,), uniform over the classes, whatever the real batch holds; None if there are none."""
        num_classes = self.config.num_classes
        if num_classes == 0:
            return None
        return self._mine(lambda count, rng: torch.randint(num_classes, (count,), generator=rng))

    def flips(self) -> Tensor:
        """Return (B,) booleans: which images to mirror."""
        return self._mine(lambda count, rng: torch.rand(count, generator=rng) < 0.5)

    def _mine(self, draw: Callable[[int, torch.Generator], Tensor]) -> Tensor:
        count = self.config.batch_size // self.lanes
        drawn = {lane: draw(count, rng) for lane, rng in self.rngs.items()}
        some = next(iter(drawn.values()))
        mine = some.new_zeros(len(self.places), *some.shape[1:])
        for lane, samples in drawn.items():
            here = self.places % self.lanes == lane
            mine[here] = samples[self.places[here] // self.lanes]
        if self.device.type == "cuda":
            mine = mine.pin_memory()  # or the copy would wait for the GPU
        return mine.to(self.device, non_blocking=True)


def prepare_batch(images: Tensor, labels: Tensor, noise: Noise) -> tuple[Tensor, Tensor | None]:
    """Return images (B, 3, R, R) in [-1, 1], flipped if the run says so, and labels (B,), on the device."""
    device = noise.device
    pixels = images.to(device, non_blocking=True).float() * (2.0 / 255.0) - 1.0
    if noise.config.flip:
        pixels = torch.where(noise.flips()[:, None, None, None], pixels.flip(3), pixels)
    return pixels, labels.to(device, non_blocking=True) if noise.config.num_classes else None


def train_step(
    state: TrainState,
    config: TrainConfig,
    images: Tensor,
    labels: Tensor,
    device: torch.device,
    world: World | None = None,
) -> dict[str, Tensor]:
    """Do one step on this process' `images` (B, 3, R, R) uint8 and `labels` (B,); return numbers, on the device.

    Keys: d_loss, g_loss, d_real and d_fake (mean logits of the discriminator's update), means over this process'
    images; grad_norm/d and grad_norm/g, of the gradient of all.
    """
    noise = Noise(config, state.step, device, world, state.rollbacks)
    real, y_real = prepare_batch(images, labels, noise)
    values, update = discriminator_gradient(state, real, y_real, noise)
    # The generator's images need nothing of the discriminator: they are made while its gradients travel.
    parts = generator_parts(state, noise)
    first = next(parts)
    values["grad_norm/d"] = update()
    values |= generator_step(state, noise, itertools.chain([first], parts))
    state.step += 1
    update_ema(state.ema, state.generator, config.ema_decay, state.step)
    return values


def discriminator_gradient(
    state: TrainState, real: Tensor, y_real: Tensor | None, noise: Noise
) -> tuple[dict[str, Tensor], Callable[[], Tensor]]:
    """Return means over this process' images, and the function that updates the discriminator and gives the norm.

    Real and fake images go through the discriminator together, in one forward a micro-batch.
    """
    y_fake = noise.classes()
    z = noise.latent()
    sums: list[Tensor] = []
    state.d_optimizer.zero_grad(set_to_none=True)
    for part in range(noise.parts):
        mine = slice(part, None, noise.parts)
        y = None if y_real is None or y_fake is None else torch.cat([y_real[mine], y_fake[mine]])
        with state.precision.autocast():
            with torch.no_grad(), statistics_shared(state.generator, part, noise.parts):
                fake = state.generator(z[mine], None if y_fake is None else y_fake[mine])
            scores = state.discriminator(torch.cat([real[mine], fake.to(real.dtype)]), y)
        d_real, d_fake = scores.split([len(fake), len(fake)])
        loss = discriminator_hinge(d_real, d_fake)
        state.d_scaler.backward(loss / noise.parts)
        sums.append(torch.stack([loss.detach(), d_real.detach().float().mean(), d_fake.detach().float().mean()]))
    finish = noise.world.average(_gradients(state.discriminator))

    def update() -> Tensor:
        finish()
        norm = state.d_scaler.update(state.d_optimizer)
        state.d_spectral.step()
        return norm

    means = torch.stack(sums).mean(0)
    return dict(zip(("d_loss", "d_real", "d_fake"), means, strict=True)), update


def generator_parts(state: TrainState, noise: Noise) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield the images of the generator's update, with their graph, and their classes, a micro-batch at a time."""
    y = noise.classes()
    z = noise.latent()
    for part in range(noise.parts):
        mine = slice(part, None, noise.parts)
        y_mine = None if y is None else y[mine]
        with state.precision.autocast(), statistics_shared(state.generator, part, noise.parts):
            images = state.generator(z[mine], y_mine)
        yield images, y_mine


def generator_step(state: TrainState, noise: Noise, parts: Iterable[tuple[Tensor, Tensor | None]]) -> dict[str, Tensor]:
    """Update the generator through the discriminator, whose weights get no gradient; return the numbers.

    `parts` are those of `generator_parts`.
    """
    losses: list[Tensor] = []
    state.discriminator.requires_grad_(False)
    state.g_optimizer.zero_grad(set_to_none=True)
    for images, y in parts:
        with state.precision.autocast():
            scores = state.discriminator(images, y)
        loss = generator_hinge(scores)
        state.g_scaler.backward(loss / noise.parts)
        losses.append(loss.detach())
    # The running averages of batch norm travel with the gradients: they are means over all micro-batches everywhere.
    noise.world.average([*_gradients(state.generator), *_running_averages(state.generator)])()
    norm = state.g_scaler.update(state.g_optimizer)
    state.g_spectral.step()
    state.discriminator.requires_grad_(True)
    return {"g_loss": torch.stack(losses).mean(), "grad_norm/g": norm}


def discriminator_hinge(real: Tensor, fake: Tensor) -> Tensor:
    """Return mean(relu(1 - real)) + mean(relu(1 + fake)), a scalar, from logits of shape (B,), in float32.

    Source: Lim and Ye 2017; Zhang et al. 2019, eq. 4.
    """
    return F.relu(1.0 - real.float()).mean() + F.relu(1.0 + fake.float()).mean()


def generator_hinge(fake: Tensor) -> Tensor:
    """Return -mean(fake), a scalar, from logits (B,), in float32."""
    return -fake.float().mean()


@torch.no_grad()
def update_ema(average: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """Move the parameters of `average` a share 1 - d towards those of `model`, d = min(decay, (1 + step)/(10 + step)).

    Batch norm's running averages move with them. Everything else that is not a parameter is copied, spectral norm's u
    and v above all: an average of unit vectors is shorter than one, and sigma would come out too small.
    """
    decay = min(decay, (1 + step) / (10 + step))
    averages: list[Tensor] = list(average.parameters())
    values = [p.detach() for p in model.parameters()]
    buffers = dict(model.named_buffers())
    for name, buffer in average.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            averages.append(buffer)
            values.append(buffers[name])
        else:
            buffer.copy_(buffers[name])
    torch._foreach_lerp_(averages, values, 1 - decay)


@contextmanager
def statistics_shared(model: nn.Module, part: int, parts: int) -> Iterator[None]:
    """Let `parts` forwards in a row move batch norm's running averages as one forward with their mean would.

    r <- (1 - m) r + m/k (s_1 + ... + s_k), by giving the j-th of k the momentum (m/k) / (1 - m (k - j)/k).
    """
    if parts == 1:
        yield
        return
    norms = [norm for norm in model.modules() if isinstance(norm, nn.BatchNorm2d)]
    before = [norm.momentum for norm in norms]
    for norm, momentum in zip(norms, before, strict=True):
        share = (momentum or 0.0) / parts
        norm.momentum = share / (1 - share * (parts - 1 - part))
    try:
        yield
    finally:
        for norm, momentum in zip(norms, before, strict=True):
            norm.momentum = momentum
            if part < parts - 1 and norm.num_batches_tracked is not None:
                norm.num_batches_tracked.sub_(1)


def _gradients(model: nn.Module) -> list[Tensor]:
    # As many tensors in every process, whatever its images left without a gradient.
    for p in model.parameters():
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    return [p.grad for p in model.parameters() if p.grad is not None]


def _running_averages(model: nn.Module) -> list[Tensor]:
    return [buffer for name, buffer in model.named_buffers() if name.endswith(("running_mean", "running_var"))]
