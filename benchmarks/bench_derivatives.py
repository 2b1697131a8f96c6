"""Derivatives of the attention block beyond the first: an R1 step and a tangent, ours against what others would do.

"r1": y = block(x), the gradient of sum(y²) for x with a graph, and the gradients of sum(y) + its squared length.
"jvp": the block and its tangent along one direction of x (`torch.func.jvp`), as MeanFlow and sCM need it.
Peers: the map in memory, SDPA's math path, and for R1 the finite difference that stands in for it where a fused
attention has no second derivative (Lin et al. 2025, APT; GAT): the squared change of the score under noise. Its note
says how far its penalty is off.
"""

import functools
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.accuracy import rel_rms
from benchmarks.harness import Case, Provider, Run, Target
from benchmarks.shapes import BlockShape
from sagan_fast.functional import self_attention_2d
from sagan_fast.kernels.self_attention import reference
from sagan_fast.kernels.self_attention.inputs import BlockInputs

SHAPES = (
    BlockShape("unpooled-64x64-C64", 2, 64, 64, 64, 8, 32, pool=False),
    BlockShape("pooled-64x64-C64", 4, 64, 64, 64, 8, 32),
)
MODES = ("forward+backward", "r1", "jvp")
STEP = 1e-2
"""Standard deviation of the finite difference's noise, as in APT."""

Block = Callable[..., Tensor]


def cases(target: Target) -> Iterator[Case]:
    """Yield every shape in every mode, in float32: second derivatives of losses are rarely taken in less."""
    for shape in SHAPES:
        for mode in MODES:
            yield case(replace(shape, B=1, H=8, W=8) if target.dry_run else shape, mode, target)


def case(shape: BlockShape, mode: str, target: Target) -> Case:
    """Return one case; its results are outputs and gradients of the mode."""

    @functools.cache
    def inputs() -> list[Tensor]:
        rng = torch.Generator().manual_seed(0)
        C, D_QK, D_V = shape.C, shape.d_qk, shape.d_v
        sizes = ((shape.B, C, shape.H, shape.W), (D_QK, C, 1, 1), (D_QK, C, 1, 1), (D_V, C, 1, 1), (C, D_V, 1, 1))
        x, *weights = (torch.randn(size, generator=rng) for size in sizes)
        return [t.to(target.device) for t in (x, *(w * C**-0.5 for w in weights), torch.tensor(0.7))]

    def fused(backend: str) -> Block:
        return lambda *tensors: self_attention_2d(*tensors, pool=shape.pool, backend=backend)

    def math(*tensors: Tensor) -> Tensor:
        made = BlockInputs(*tensors)
        q, k, v = (t.unsqueeze(1) for t in reference.projections(made, shape.pool))
        with sdpa_kernel(SDPBackend.MATH):
            out = F.scaled_dot_product_attention(q, k, v, scale=1.0).squeeze(1)
        return reference.unproject(out, made.x, made.w_o, None, made.gamma)

    def truth() -> Sequence[Tensor]:
        return runner(fused("eager"), mode, [t.double() for t in inputs()])(0)

    def provider(name: str, block: Block) -> Provider:
        return Provider(name, lambda: runner(block, mode, inputs()))

    providers = [provider("eager", fused("eager")), provider("sdpa-math", math)]
    if mode == "r1":
        off = lambda: f"penalty off by {rel_rms(differences(0)[0], truth()[0]):.1%}"  # noqa: E731
        differences = lambda i: runner(fused(target.backend), "finite difference", inputs())(i)  # noqa: E731
        exact = lambda: runner(fused("eager"), "finite difference", [t.double() for t in inputs()])(0)  # noqa: E731
        providers.append(Provider("finite-difference", lambda: differences, off, exact))
    providers.append(provider("auto" if target.backend == "auto" else "triton", fused(target.backend)))
    return Case(
        "derivatives", shape.name, "fp32", mode, providers, truth,
        own=inputs,
        # the finite difference takes the difference of two scores that are nearly equal, in float32
        tolerance=5e-2 if mode == "r1" else 1e-4,
        methods=("eager",),
        config={"B": shape.B, "N": shape.N, "M": shape.M},
    )  # fmt: skip


def runner(block: Block, mode: str, tensors: Sequence[Tensor]) -> Run:
    """Return what does the mode's work once."""

    def jvp(i: int) -> list[Tensor]:
        x, *weights = tensors
        return list(torch.func.jvp(lambda x: block(x, *weights), (x,), (x.flip(0),)))

    def step(i: int) -> list[Tensor]:
        x, *weights = leaves = [t.detach().requires_grad_() for t in tensors]
        y = block(*leaves)
        if mode == "forward+backward":
            loss = y.square().sum()
            return [y.detach(), *torch.autograd.grad(loss, leaves)]
        if mode == "r1":
            (d_x,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
            penalty = d_x.square().sum()
        else:
            noise = STEP * torch.randn(x.shape, generator=torch.Generator().manual_seed(1000 + i)).to(x)
            moved = block(x + noise, *weights).square().sum((1, 2, 3))
            penalty = ((moved - y.square().sum((1, 2, 3))) / STEP).square().sum()
        return [penalty.detach(), *torch.autograd.grad(y.sum() + penalty, leaves)]

    return jvp if mode == "jvp" else step


if __name__ == "__main__":
    command = [sys.executable, "-m", "benchmarks.run", "--only", "derivatives", *sys.argv[1:]]
    sys.exit(subprocess.run(command).returncode)
