"""A whole SAGAN step (discriminator, generator, averaging), ours against the same models written plainly.

The peers use the same layers with eager attention and torch's spectral norm, which moves at every forward, as in the
existing code bases.
"""

import functools
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness import Case, Provider, Run, Target
from benchmarks.step_options import main, set_gammas
from sagan_fast.choices import Resizing
from sagan_fast.layers.residual_blocks import DiscriminatorBlock, GeneratorBlock
from sagan_fast.models.discriminator import Discriminator
from sagan_fast.models.generator import Generator
from sagan_fast.training.config import TrainConfig
from sagan_fast.training.cuda_graph import CapturedStep
from sagan_fast.training.losses import discriminator_hinge, generator_hinge
from sagan_fast.training.state import new_state
from sagan_fast.training.step import Noise, prepare_batch, train_step

SIZES = {"cpu": (("shapes-32", 32),), "cuda": (("official-128-feat64", 64), ("tiny-imagenet-64", 64))}
LARGE = (("official-128-feat64", 256), ("official-128-feat32", 256))
"""Of a GPU, with the batch of the paper."""


def cases(target: Target, sizes: Sequence[tuple[str, int]] = ()) -> Iterator[Case]:
    """Yield one case for each preset and batch size, by default those of SIZES; bfloat16 on CUDA."""
    if target.dry_run:
        yield case("shapes-32", 2, target, {"base_channels": 4})
    else:
        yield from (case(*size, target) for size in sizes or SIZES[target.device])


def large(target: Target) -> Iterator[Case]:
    """Yield the large batches."""
    return cases(target, LARGE)


def case(preset: str, batch: int, target: Target, narrow: dict[str, int] | None = None) -> Case:
    """Return the case of one preset: results are the losses of a step from the same weights and noise."""
    device = target.device
    precision = "bf16" if device == "cuda" else "fp32"

    def config(backend: str, name: str = precision) -> TrainConfig:
        options: dict[str, Any] = dict(batch_size=batch, backend=backend, precision=name, device=device)
        options |= dict(generator=narrow or {}, discriminator=narrow or {})
        return TrainConfig.from_preset(preset, data="shapes", out="-", **options)

    def ours(captured: bool = False) -> Run:
        made = config(target.backend)
        state = new_state(made, torch.device(device))
        set_gammas(state.generator, state.discriminator)
        images, labels = real_batch(made, device)
        said: list[str] = []
        step = CapturedStep(state, made, said.append) if captured else None

        def run(i: int) -> list[Tensor]:
            values = step(images, labels) if step else train_step(state, made, images, labels, torch.device(device))
            if step and step.has_failed:
                raise RuntimeError(said[-1])
            return [values["d_loss"], values["g_loss"]]

        return run

    def plain(name: str, **options: bool) -> Provider:
        return Provider(
            name,
            lambda: plain_step(config("eager"), device, **options),
            compile_s=90.0 * options.get("compiled", False),
        )

    providers = [plain("eager-amp"), plain("eager-amp-channels_last", channels_last=True)]
    if target.gpu:
        providers.append(plain("eager-amp-compiled", channels_last=True, compiled=True))
    providers.append(Provider("ours", ours))
    if target.gpu:
        providers.append(Provider("ours-cuda-graph", lambda: ours(captured=True)))
    return Case(
        "train_step", f"{preset}-batch{batch}", precision, "forward+backward", providers,
        lambda: plain_step(config("eager", "fp32"), device)(0),
        # torch's spectral norm has moved u and v once more by the first loss
        tolerance=5e-2 if precision == "bf16" else 2e-3,
        methods=("eager",),
        config={"preset": preset, "batch_size": batch},
        needs=(0.0 if narrow else count_flops(config("eager")), 0.0, 0.0),
    )  # fmt: skip


def real_batch(config: TrainConfig, device: str) -> tuple[Tensor, Tensor]:
    """Return random images (B, 3, R, R) uint8 and labels (B,) on `device`."""
    rng = torch.Generator().manual_seed(0)
    size = (config.batch_size, 3, config.resolution, config.resolution)
    images = torch.randint(256, size, generator=rng, dtype=torch.uint8)
    return images.to(device), torch.randint(config.num_classes, size[:1], generator=rng).to(device)


def with_torch_spectral_norm(model: nn.Module) -> nn.Module:
    """Return `model` with torch's own spectral norm in the place of ours, u and v kept."""
    for module in model.modules():
        if parametrize.is_parametrized(module):
            norm = module.parametrizations["weight"][0]
            u, v = norm._u.clone(), norm._v.clone()
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
            parametrizations.spectral_norm(module, eps=norm.eps)
            theirs = module.parametrizations["weight"][0]
            theirs._u.copy_(u), theirs._v.copy_(v)
    return model


def plain_step(config: TrainConfig, device: str, *, channels_last: bool = False, compiled: bool = False) -> Run:
    """Return a step as it is usually written, from the weights that `new_state` draws."""
    state = new_state(config, torch.device(device))
    set_gammas(state.generator, state.discriminator)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    generator, discriminator = (
        with_torch_spectral_norm(model).to(memory_format=layout) for model in (state.generator, state.discriminator)
    )
    g_adam = torch.optim.Adam(generator.parameters(), config.g_lr, (config.beta1, config.beta2))
    d_adam = torch.optim.Adam(discriminator.parameters(), config.d_lr, (config.beta1, config.beta2))
    average = [p.detach().clone() for p in generator.parameters()]
    images, labels = real_batch(config, device)
    g, d = (torch.compile(generator), torch.compile(discriminator)) if compiled else (generator, discriminator)
    step = 0

    def run(i: int) -> list[Tensor]:
        nonlocal step
        noise = Noise(config, step, torch.device(device))
        real, y_real = prepare_batch(images, labels, noise)
        y = noise.classes()
        with state.precision.autocast():
            with torch.no_grad():
                fake = g(noise.latent(), y)
            real_score, fake_score = d(torch.cat([real, fake.to(real.dtype)]), torch.cat([y_real, y])).chunk(2)
            d_loss = discriminator_hinge(real_score, fake_score)
        d_adam.zero_grad()
        d_loss.backward()
        d_adam.step()
        y = noise.classes()
        with state.precision.autocast():
            g_loss = generator_hinge(d(g(noise.latent(), y), y))
        g_adam.zero_grad()
        g_loss.backward()
        g_adam.step()
        with torch.no_grad():
            torch._foreach_lerp_(average, [p.detach() for p in generator.parameters()], 1e-4)
        step += 1
        return [d_loss.detach(), g_loss.detach()]

    return run


@functools.cache  # several parts have the same case
def count_flops(config: TrainConfig) -> float:
    """Return the FLOP of one step's convolutions and products, counted on shapes alone (the device meta)."""
    return float(sum(flops_by_operator(config).values()))


def flops_by_operator(config: TrainConfig, resizing: Resizing = "plain") -> dict[str, float]:
    """Return the FLOP of one step by the name of the operator, with that form of resizing and eager attention."""
    with torch.device("meta"):
        generator, discriminator = Generator(config.generator), Discriminator(config.discriminator)
        for module in nn.ModuleList([generator, discriminator]).modules():
            if isinstance(module, (GeneratorBlock, DiscriminatorBlock)):
                module.resizing = resizing
        B, R = config.batch_size, config.resolution
        z, y = torch.empty(B, config.generator.z_dim), torch.empty(B, dtype=torch.long)
        with FlopCounterMode(display=False) as counter:
            with torch.no_grad():
                generator(z, y)
            discriminator(torch.empty(2 * B, 3, R, R), torch.cat([y, y])).sum().backward()
            discriminator.requires_grad_(False)
            discriminator(generator(z, y), y).sum().backward()
    return {str(operator): float(flops) for operator, flops in counter.get_flop_counts()["Global"].items()}


if __name__ == "__main__":
    sys.exit(main())
