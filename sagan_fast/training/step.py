"""One training step: the discriminator, then the generator, one update each (Zhang et al. 2019, §4).

A step is one function of the global batch, for any number of processes and micro-batches. Noise and labels are drawn
for the whole batch from (seed, step). Process r of W takes the samples r, r + W, ...; its micro-batch a of k takes
every k-th of them from a on. Gradients and losses are means over all. Only batch norm depends on the division: its
batches are the micro-batches, which are the same for any number of processes with the same micro-batch size.
"""

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sagan_fast.distributed import World
from sagan_fast.training.augment import NUMBERS, augment
from sagan_fast.training.config import TrainConfig
from sagan_fast.training.losses import LOSSES, PENALTIES, exact, image_gradients, penalty_weights
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
        mine: dict[int, list[int]] = {}  # by lane: which of its samples are this process'
        places: dict[int, list[int]] = {}  # and their positions in this process' share of the batch
        for place, sample in enumerate(range(self.world.rank, config.batch_size, self.world.size)):
            mine.setdefault(sample % lanes, []).append(sample // lanes)
            places.setdefault(sample % lanes, []).append(place)
        order = sorted(mine)
        self.order = torch.tensor([place for lane in order for place in places[lane]]).argsort()
        self.mine = {lane: torch.tensor(mine[lane]) for lane in order}
        self.rngs = {lane: torch.Generator().manual_seed((mixed + lane * 0xBF58476D1CE4E5B9) % 2**63) for lane in order}

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
        return self.shares() < 0.5

    def shares(self) -> Tensor:
        """Return (B,), uniform in [0, 1)."""
        return self._mine(lambda count, rng: torch.rand(count, generator=rng))

    def changes(self, sets: int) -> list[Tensor | None]:
        """Return DiffAugment's numbers (B, NUMBERS) for each of so many sets of images; None each where it is off."""
        if not self.config.diffaugment:
            return [None] * sets
        return list(self._mine(lambda count, rng: torch.rand(count, sets, NUMBERS, generator=rng)).unbind(1))

    def _mine(self, draw: Callable[[int, torch.Generator], Tensor]) -> Tensor:
        return self.on_host(draw).to(self.device, non_blocking=self.device.type == "cuda")

    def on_host(self, draw: Callable[[int, torch.Generator], Tensor]) -> Tensor:
        """Return what `draw(count, generator)` draws for the images of this process, in the CPU's memory."""
        count = self.config.batch_size // self.lanes
        drawn = [draw(count, rng)[self.mine[lane]] for lane, rng in self.rngs.items()]
        mine = drawn[0] if len(drawn) == 1 else torch.cat(drawn)[self.order]
        if self.device.type == "cuda":
            mine = mine.pin_memory()  # or the copy would wait for the GPU
        return mine


def prepare_batch(images: Tensor, labels: Tensor, noise: Noise) -> tuple[Tensor, Tensor | None]:
    """Return images (B, 3, R, R) in [-1, 1], flipped if the run says so, and labels (B,), on the device."""
    device, is_cuda = noise.device, noise.device.type == "cuda"
    pixels = images.to(device, non_blocking=is_cuda).float() * (2.0 / 255.0) - 1.0
    if noise.config.flip:
        pixels = torch.where(noise.flips()[:, None, None, None], pixels.flip(3), pixels)
    return pixels, labels.to(device, non_blocking=is_cuda) if noise.config.num_classes else None


def train_step(
    state: TrainState,
    config: TrainConfig,
    images: Tensor,
    labels: Tensor,
    device: torch.device,
) -> dict[str, Tensor]:
    """Do one step on this process' `images` (B, 3, R, R) uint8 and `labels` (B,); return numbers, on the device.

    Keys: d_loss, g_loss, d_real and d_fake (mean logits of the discriminator's update), means over this process'
    images; grad_norm/d and grad_norm/g, of the gradient of all. Also, without their weights, the penalties that this
    step has, as means over this process' images: r1, r2, gradient_penalty, lecam. d_loss is without them.
    """
    noise = Noise(config, state.step, device, state.world, state.rollbacks)
    values = update_networks(state, images, labels, noise, ema_share(config.ema_decay, state.step + 1))
    state.step += 1
    return values


def update_networks(
    state: TrainState, images: Tensor, labels: Tensor, noise: Noise, share: float | Tensor
) -> dict[str, Tensor]:
    """Do the part of `train_step` that the device does; `share` is that of the weights in their average.

    All that differs from step to step comes in by the arguments, but for the penalties, which `state.step` has or not.
    """
    real, y_real = prepare_batch(images, labels, noise)
    values, update = discriminator_gradient(state, real, y_real, noise)
    # The generator's images need nothing of the discriminator: they are made while its gradients travel.
    parts = generator_parts(state, real, y_real, noise)
    first = next(parts)
    values["grad_norm/d"] = update()
    state.d_optimizer.zero_grad(set_to_none=True)  # no gradients of one lie in memory while the other is updated
    values |= generator_step(state, noise, itertools.chain([first], parts))
    state.g_optimizer.zero_grad(set_to_none=True)
    update_ema(state.ema, state.generator, share)
    return values


def discriminator_gradient(
    state: TrainState, real: Tensor, y_real: Tensor | None, noise: Noise
) -> tuple[dict[str, Tensor], Callable[[], Tensor]]:
    """Return means over this process' images, and the function that updates the discriminator and gives the norm."""
    config = noise.config
    loss, weights = LOSSES[config.loss], penalty_weights(config, state.step)
    y_fake = y_real if loss.is_paired else noise.classes()
    z = noise.latent()
    shares = noise.shares()[:, None, None, None] if "gradient_penalty" in weights else None
    changes = noise.changes(2 if shares is None else 3)
    lines: list[dict[str, Tensor]] = []
    state.d_optimizer.zero_grad(set_to_none=True)
    for part in range(noise.parts):
        mine = slice(part, None, noise.parts)
        with state.precision.autocast(), torch.no_grad(), statistics_shared(state.generator, part, noise.parts):
            fake = state.generator(z[mine], _part(y_fake, mine)).to(real.dtype)
        labels = _part(y_real, mine), _part(y_fake, mine)
        with state.d_replica.accumulating(part, noise.parts):
            seen = [partial(augment, policy=config.diffaugment, numbers=_part(each, mine)) for each in changes]
            scores, values = scores_and_penalties(state, real[mine], fake, labels, weights, _part(shares, mine), seen)
            total = adversarial = loss.discriminator(*scores)
            if config.lecam_weight:
                values["lecam"] = state.lecam.penalty(*scores)
                total = total + config.lecam_weight * values["lecam"]
            for name, weight in weights.items():
                total = total + weight * values[name]
            state.d_scaler.backward(total / noise.parts)
        d_real, d_fake = (exact(each.detach()).mean() for each in scores)
        lines.append({"d_loss": adversarial, "d_real": d_real, "d_fake": d_fake, **values})
    means = {name: torch.stack([line[name].detach() for line in lines]).mean() for name in lines[0]}
    # LeCam's averages are over all processes' images: their scores travel behind the gradients.
    scored = [torch.stack([means["d_real"], means["d_fake"]])] if config.lecam_weight else []
    finish = noise.world.average(scored)

    def update() -> Tensor:
        state.d_replica.finish()
        finish()
        norm = state.d_scaler.update(state.d_optimizer)
        state.d_spectral.step()
        for each in scored:
            state.lecam.update(each)
        return norm

    return means, update


def scores_and_penalties(
    state: TrainState,
    real: Tensor,
    fake: Tensor,
    labels: tuple[Tensor | None, Tensor | None],
    names: Collection[str],
    shares: Tensor | None,
    seen: Sequence[Callable[[Tensor], Tensor]],
) -> tuple[tuple[Tensor, Tensor], dict[str, Tensor]]:
    """Return the logits (B,) of `real` and `fake` images, and the gradient penalties `names`, all with their graph.

    `labels` are those of the real and the fake images. Points between have a share (B, 1, 1, 1) of the fake image,
    and the label of the real one. The discriminator sees real images, fake images and points between through the
    functions `seen`. Penalties are of gradients at the images before these, as in StyleGAN2's code with DiffAugment.
    Real and fake images go through the discriminator together, in one forward, unless only one of R1 and R2 is asked
    for: then a graph of the backward is kept for that half alone.
    """
    y_real, y_fake = labels
    real, fake = real.detach().requires_grad_("r1" in names), fake.detach().requires_grad_("r2" in names)
    with state.precision.autocast():
        real_seen, fake_seen = seen[0](real), seen[1](fake)
        if real.requires_grad == fake.requires_grad:
            y = None if y_real is None or y_fake is None else torch.cat([y_real, y_fake])
            d_real, d_fake = state.d_replica(torch.cat([real_seen, fake_seen]), y).chunk(2)
        else:
            d_real, d_fake = state.d_replica(real_seen, y_real), state.d_replica(fake_seen, y_fake)
        scored = {"r1": (real, d_real), "r2": (fake, d_fake)}
        if shares is not None:
            between = torch.lerp(real.detach(), fake.detach(), shares).requires_grad_()
            scored["gradient_penalty"] = between, state.d_replica(seen[2](between), y_real)
    if not names:
        return (d_real, d_fake), {}
    images, scores = zip(*(scored[name] for name in names), strict=True)
    gradients = image_gradients(images, scores, state.d_scaler)
    return (d_real, d_fake), {name: PENALTIES[name](each) for name, each in zip(names, gradients, strict=True)}


class GeneratorPart(NamedTuple):
    """A micro-batch of the generator's update: images with their graph, their classes, the real images beside them.

    Images are as the discriminator sees them, changed by DiffAugment if the run says so.
    """

    images: Tensor
    y: Tensor | None
    real: Tensor | None


def generator_parts(state: TrainState, real: Tensor, y_real: Tensor | None, noise: Noise) -> Iterator[GeneratorPart]:
    """Yield the micro-batches of the generator's update; `real` only where the loss compares with real images."""
    is_paired = LOSSES[noise.config.loss].is_paired
    y = y_real if is_paired else noise.classes()
    z = noise.latent()
    policy, changes = noise.config.diffaugment, noise.changes(2 if is_paired else 1)
    for part in range(noise.parts):
        mine = slice(part, None, noise.parts)
        y_mine = _part(y, mine)
        shared, sent = (
            statistics_shared(state.generator, part, noise.parts),
            state.g_replica.accumulating(part, noise.parts),
        )
        with state.precision.autocast(), shared, sent:
            images = augment(state.g_replica(z[mine], y_mine), policy, _part(changes[0], mine))
        yield GeneratorPart(images, y_mine, augment(real[mine], policy, _part(changes[1], mine)) if is_paired else None)


def generator_step(state: TrainState, noise: Noise, parts: Iterable[GeneratorPart]) -> dict[str, Tensor]:
    """Update the generator through the discriminator, whose weights get no gradient; return the numbers.

    `parts` are those of `generator_parts`.
    """
    losses: list[Tensor] = []
    state.discriminator.requires_grad_(False)
    state.g_optimizer.zero_grad(set_to_none=True)
    for part, (images, y, real) in enumerate(parts):
        if part == noise.parts - 1:  # batch norm's running averages are means over all micro-batches everywhere
            finish = noise.world.average(_running_averages(state.generator))
        with state.precision.autocast():
            scores = state.discriminator(images, y)
            d_real = scores.detach() if real is None else state.discriminator(real, y)
        loss = LOSSES[noise.config.loss].generator(scores, d_real)
        state.g_scaler.backward(loss / noise.parts)
        losses.append(loss.detach())
    state.g_replica.finish()
    finish()
    norm = state.g_scaler.update(state.g_optimizer)
    state.g_spectral.step()
    state.discriminator.requires_grad_(True)
    return {"g_loss": torch.stack(losses).mean(), "grad_norm/g": norm}


def ema_share(decay: float, step: int) -> float:
    """Return the share of the weights after `step` steps in their average, 1 - min(decay, (1 + step)/(10 + step))."""
    return 1 - min(decay, (1 + step) / (10 + step))


@torch.no_grad()
def update_ema(average: nn.Module, model: nn.Module, share: float | Tensor) -> None:
    """Move the parameters of `average` by `share`, a number or a scalar tensor, towards those of `model`.

    Batch norm's running averages move with them. Everything else that is not a parameter is copied, spectral norm's u
    and v above all: an average of unit vectors is shorter than one, and sigma would come out too small.
    """
    averages: list[Tensor] = list(average.parameters())
    values = [p.detach() for p in model.parameters()]
    buffers = dict(model.named_buffers())
    copies: dict[str, Tensor] = {}
    for name, buffer in average.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            averages.append(buffer)
            values.append(buffers[name])
        else:
            copies[name] = buffer
    torch._foreach_lerp_(averages, values, [share] * len(values) if isinstance(share, Tensor) else share)
    if copies:
        torch._foreach_copy_(list(copies.values()), [buffers[name] for name in copies])


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


def _part(tensor: Tensor | None, mine: slice) -> Tensor | None:
    return None if tensor is None else tensor[mine]


def _running_averages(model: nn.Module) -> list[Tensor]:
    return [buffer for name, buffer in model.named_buffers() if name.endswith(("running_mean", "running_var"))]
