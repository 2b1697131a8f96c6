"""A whole SAGAN step (discriminator, generator, averaging), ours against the same models written plainly.

python -m benchmarks.bench_train_step [options of benchmarks.run]. The peers use the same layers with eager attention
and torch's spectral norm, advanced at every forward, as the existing code bases do.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness import Case, Provider, Run
from sagan_fast.layers.self_attention import SelfAttention2d
from sagan_fast.training.config import TrainConfig
from sagan_fast.training.losses import discriminator_hinge, generator_hinge
from sagan_fast.training.state import new_state
from sagan_fast.training.step import Noise, prepare_batch, train_step

GPU_CASES = (
    ("official-128-feat64", 256),
    ("official-128-feat32", 256),
    ("official-128-feat64", 64),
    ("tiny-imagenet-64", 64),
)


def cases(
    device: str, sizes: Sequence[tuple[str, int]] = GPU_CASES, tiny: bool = False, who: str | None = None
) -> Iterator[Case]:
    """Yield one case a preset and batch size, bf16 on CUDA.

    `who`: the device whose providers are asked, where that is not `device`: a GPU's, in a dry run.
    """
    for preset, batch in sizes:
        narrow = {"base_channels": 4} if tiny else {}
        yield case(preset, batch, device, narrow, who)


def case(preset: str, batch: int, device: str, narrow: dict[str, int], who: str | None = None) -> Case:
    """Return the case of one preset: results are the losses of a step from the same weights and noise."""
    precision = "bf16" if device == "cuda" else "fp32"

    def config(backend: str, name: str = precision) -> TrainConfig:
        return TrainConfig.from_preset(
            preset, data="shapes", out="-", batch_size=batch, backend=backend, precision=name, device=device,
            generator=narrow, discriminator=narrow,
        )  # fmt: skip

    def ours(backend: str) -> Callable[[], Run]:
        def prepare() -> Run:
            made = config(backend)
            state = new_state(made, torch.device(device))
            set_gammas(state.generator, state.discriminator)
            images, labels = real_batch(made, device)

            def run(i: int) -> list[Tensor]:
                values = train_step(state, made, images, labels, torch.device(device))
                return [values["d_loss"], values["g_loss"]]

            return run

        return prepare

    providers = [
        Provider("eager-amp", lambda: plain_step(config("eager"), device, False, False)),
        Provider("eager-amp-channels_last", lambda: plain_step(config("eager"), device, True, False)),
    ]
    if (who or device) == "cuda":
        compiled = Provider("eager-amp-compiled", lambda: plain_step(config("eager"), device, True, True))
        providers += [compiled, Provider("ours", ours("triton"))]
    else:
        providers.append(Provider("ours", ours("auto")))

    def truth() -> list[Tensor]:
        return list(plain_step(config("eager", "fp32"), device, False, False)(0))

    return Case(
        "train_step",
        f"{preset}-batch{batch}",
        precision,
        "forward+backward",
        providers,
        truth,
        # torch's spectral norm has moved u and v once more by the first loss
        tolerance=5e-2 if precision == "bf16" else 2e-3,
        methods=("eager",),
        config={"preset": preset, "batch_size": batch},
        needs=(0.0 if narrow else count_flops(config("eager")), 0.0, 0.0),
    )


def set_gammas(*models: nn.Module) -> None:
    """Set every gamma to 0.5: at 0 an attention block would have no gradient to compute."""
    with torch.no_grad():
        for model in models:
            for module in model.modules():
                if isinstance(module, SelfAttention2d):
                    module.gamma.fill_(0.5)


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


def plain_step(config: TrainConfig, device: str, channels_last: bool, compiled: bool) -> Run:
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


def count_flops(config: TrainConfig) -> float:
    """Return the FLOP of one step's convolutions and products, counted on shapes alone (the device meta)."""
    with torch.device("meta"):
        state_generator, state_discriminator = _models(config)
        B, R = config.batch_size, config.resolution
        z, y = torch.empty(B, config.generator.z_dim), torch.empty(B, dtype=torch.long)
        with FlopCounterMode(display=False) as counter:
            with torch.no_grad():
                state_generator(z, y)
            state_discriminator(torch.empty(2 * B, 3, R, R), torch.cat([y, y])).sum().backward()
            state_discriminator.requires_grad_(False)
            state_discriminator(state_generator(z, y), y).sum().backward()
    return float(counter.get_total_flops())


def _models(config: TrainConfig) -> tuple[nn.Module, nn.Module]:
    from sagan_fast.models.discriminator import Discriminator
    from sagan_fast.models.generator import Generator

    return Generator(config.generator), Discriminator(config.discriminator)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure on the device at hand and append the records; see benchmarks/run.py for the options."""
    from benchmarks.run import main as run

    return run(["--only", "train_step", *(argv or sys.argv[1:])])


if __name__ == "__main__":
    sys.exit(main())
