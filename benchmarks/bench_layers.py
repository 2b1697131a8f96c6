"""The layers and both networks as modules, ours against the same modules in plain PyTorch.

python -m benchmarks.bench_layers [options of benchmarks.run]. The peers are the very same modules with eager attention
and torch's own spectral norm; all spectral norms move once a call. On CUDA weights are float32 under bfloat16 autocast,
maps channels_last.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from benchmarks.bench_train_step import set_gammas, with_torch_spectral_norm
from benchmarks.harness import Case, Provider, Run
from sagan_fast.layers.residual_blocks import DiscriminatorBlock, GeneratorBlock, sn_conv
from sagan_fast.layers.self_attention import SelfAttention2d
from sagan_fast.layers.spectral_norm import fuse_spectral_norm
from sagan_fast.models.discriminator import Discriminator
from sagan_fast.models.generator import Generator


@dataclass(frozen=True)
class Layer:
    """A module to time: `make(backend)` builds it, `size` is its input's; `classes` above 0 where it takes y."""

    name: str
    make: Callable[[str], nn.Module]
    size: tuple[int, ...]
    classes: int = 0


def layers(B: int, width: int, side: int) -> list[Layer]:
    """Return the layers on maps of `side` x `side`: attention of `width` channels, blocks, a convolution."""
    wide = (B, 2 * width, side // 2, side // 2)
    return [
        Layer(
            f"SelfAttention2d-{side}x{side}-C{width}",
            lambda backend: SelfAttention2d(width, backend=backend),
            (B, width, side, side),
        ),
        Layer(f"GeneratorBlock-{side}x{side}-C{width}", lambda _: GeneratorBlock(2 * width, width, 10), wide, 10),
        Layer(
            f"DiscriminatorBlock-{side // 2}x{side // 2}-C{2 * width}",
            lambda _: DiscriminatorBlock(width, 2 * width),
            (B, width, side, side),
        ),
        Layer(f"spectral-conv-{side // 2}x{side // 2}-C{2 * width}", lambda _: _Conv(2 * width), wide),
    ]


def networks(preset: str, B: int, **overrides: int) -> list[Layer]:
    """Return generator and discriminator of `preset` on a batch of B."""
    g = Generator.from_preset(preset, **overrides).config
    side = g.resolution
    return [
        Layer(
            f"generator-{preset}",
            lambda backend: Generator.from_preset(preset, backend=backend, **overrides),
            (B, g.z_dim),
            g.num_classes,
        ),
        Layer(
            f"discriminator-{preset}",
            lambda backend: Discriminator.from_preset(preset, backend=backend, **overrides),
            (B, 3, side, side),
            g.num_classes,
        ),
    ]


class _Conv(nn.Module):
    """One spectral-normed 3x3 convolution, as a module that holds a parametrized one."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = sn_conv(channels, channels, 3, 1e-12)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


def cases(device: str, tiny: bool = False, who: str | None = None) -> Iterator[Case]:
    """Yield forward and forward+backward of every layer and of both networks.

    `who`: the device whose providers are asked, where that is not `device`: a GPU's, in a dry run.
    """
    if tiny:
        chosen = layers(2, 8, 8) + networks("shapes-32", 2, base_channels=4)
    elif device == "cpu":
        chosen = layers(4, 64, 32) + networks("shapes-32", 16)
    else:
        chosen = layers(64, 128, 64) + networks("official-128-feat64", 64)
    for layer in chosen:
        for mode in ("forward", "forward+backward"):
            yield case(layer, mode, device, who)


def case(layer: Layer, mode: str, device: str, who: str | None = None) -> Case:
    """Return the case of one layer: results are the output and, with backward, the gradient of the input.

    The gradients of the weights are computed in the same call, and held against float64 in the tests.
    """
    backward = mode != "forward"
    dtype = "bf16" if device == "cuda" else "fp32"
    first: list[dict[str, Tensor]] = []
    owned: list[Tensor] = []

    def build(backend: str) -> nn.Module:
        """Return the layer with the same weights, u and v every time."""
        torch.manual_seed(0)
        module = layer.make(backend).train()
        set_gammas(module)
        if not first:
            first.append(copy.deepcopy(module.state_dict()))
        module.load_state_dict(first[0])
        return module

    def inputs(kind: torch.dtype = torch.float32) -> tuple[Tensor, Tensor | None]:
        rng = torch.Generator().manual_seed(1)
        x = torch.randn(layer.size, generator=rng).to(device, kind)
        if x.ndim == 4 and device == "cuda":
            x = x.contiguous(memory_format=torch.channels_last)
        y = torch.randint(layer.classes, layer.size[:1], generator=rng).to(device) if layer.classes else None
        return x.requires_grad_(backward), y

    def runner(module: nn.Module, call: Callable[..., Tensor], x: Tensor, y: Tensor | None, amp: bool) -> Run:
        parameters = [p for p in module.parameters() if p.requires_grad]
        d_out: list[Tensor] = []
        owned.extend([x, *module.parameters(), *module.buffers()])

        def run(i: int) -> list[Tensor]:
            with torch.set_grad_enabled(backward):
                with torch.autocast(device, torch.bfloat16, enabled=amp):
                    out = call(x) if y is None else call(x, y)
                if not backward:
                    return [out]
                if not d_out:
                    rng = torch.Generator().manual_seed(2)
                    d_out.append(torch.randn(out.shape, generator=rng).to(device, out.dtype))
                return [out.detach(), torch.autograd.grad(out, [x, *parameters], d_out[0])[0]]

        return run

    def peer(compiled: bool) -> Callable[[], Run]:
        def prepare() -> Run:
            module = with_torch_spectral_norm(build("eager")).to(device)
            if device == "cuda":
                module = module.to(memory_format=torch.channels_last)
            call = torch.compile(module, dynamic=False) if compiled else module
            return runner(module, call, *inputs(), device == "cuda")

        return prepare

    def ours() -> Run:
        module = build("triton" if (who or device) == "cuda" else "auto").to(device)
        if device == "cuda":
            module.to(memory_format=torch.channels_last)
        if not any(parametrize.is_parametrized(part) for part in module.modules()):
            return runner(module, module, *inputs(), device == "cuda")
        group = fuse_spectral_norm(module, update="step")

        def call(*args: Tensor) -> Tensor:
            group.step()
            return module(*args)

        return runner(module, call, *inputs(), device == "cuda")

    def truth() -> list[Tensor]:
        module = with_torch_spectral_norm(build("eager")).double().to(device)
        return list(runner(module, module, *inputs(torch.float64), False)(0))

    providers = [Provider("eager", peer(False)), Provider("ours", ours)]
    if (who or device) == "cuda":
        providers.insert(1, Provider("eager-compiled", peer(True)))
    return Case(
        "layers", layer.name, dtype, mode, providers, truth,
        own=lambda: owned,
        # a network is some twenty layers deep, each of which rounds
        tolerance=1e-4 if dtype == "fp32" else 1e-1,
        methods=("eager",), config={"batch_size": layer.size[0]},
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Measure on the device at hand and append the records; see benchmarks/run.py for the options."""
    from benchmarks.run import main as run

    return run(["--only", "layers", *(argv or sys.argv[1:])])


if __name__ == "__main__":
    sys.exit(main())
