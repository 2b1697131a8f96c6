"""The attention block, ours against every peer: python -m benchmarks.bench_attention [options of benchmarks.run]."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.ceilings import TORCH_DTYPES
from benchmarks.harness import Case, Provider, Run
from benchmarks.peers_attention import blocks, sdpa_choice
from benchmarks.shapes import BLOCK_SHAPES, BlockShape

CACHE_BYTES = {"cuda": 150 << 20, "cpu": 0}
"""Inputs of a case are together larger than this, two and a half times the L2 of an H200, or there are MOST_SETS."""

MOST_SETS = 64

CPU_SHAPES = (
    BlockShape("cpu-unpooled-64x64-C64", 2, 64, 64, 64, 8, 64, pool=False, out_proj=False),
    BlockShape("cpu-feat64-G-64x64-C128", 2, 128, 64, 64, 16, 64),
    BlockShape("cpu-official-G-32x32-C256", 4, 256, 32, 32, 32, 128),
    BlockShape("cpu-shapes-16x16-C32", 32, 32, 16, 16, 4, 16),
)


def sweep(device: str) -> list[BlockShape]:
    """Return shapes over N from 256 to 16384, and over B from 1 to 256."""
    if device == "cpu":
        base, B, prefix = BlockShape("", 1, 32, 32, 32, 4, 16), 1, "cpu-sweep"
    else:
        base, B, prefix = BlockShape("", 64, 128, 64, 64, 16, 64), 16, "sweep"
    sized = [replace(base, name=f"{prefix}-N{s * s}", B=B, H=s, W=s) for s in (16, 32, 64, 128)]
    return sized + [replace(base, name=f"{prefix}-B{b}", B=b) for b in (1, 4, 16, 64, 256)]


def cases(
    device: str, dtypes: Sequence[str] = ("bf16",), shapes: Sequence[BlockShape] | None = None, who: str | None = None
) -> Iterator[Case]:
    """Yield the block's cases: every shape and dtype, forward and forward+backward; `who` as in `case`."""
    if shapes is None:
        shapes = CPU_SHAPES if device == "cpu" else BLOCK_SHAPES
    for dtype in ["fp32"] if device == "cpu" else dtypes:
        for shape in shapes:
            for mode in ("forward", "forward+backward"):
                yield case(shape, dtype, mode, device, who)


def case(shape: BlockShape, dtype: str, mode: str, device: str, who: str | None = None) -> Case:
    """Return the case of one block: its providers share inputs, which are made when the first of them is prepared.

    `who`: the device whose providers are asked, where that is not `device`: a GPU's, in a dry run.
    """
    backward = mode != "forward"
    x_bytes = shape.B * shape.C * shape.N * TORCH_DTYPES[dtype].itemsize
    num_sets = max(1, min(MOST_SETS, -(-CACHE_BYTES[device] // x_bytes))) if CACHE_BYTES[device] else 1
    made: list[list[Tensor | None]] = []

    def sets() -> list[list[Tensor | None]]:
        if not made:
            made.extend(inputs(shape, dtype, device, seed) for seed in range(num_sets))
        return made

    @functools.cache
    def d_ys() -> list[Tensor]:
        return [gradient(shape, dtype, device, seed) for seed in range(num_sets)] if backward else []

    def provider(name: str, maker: Callable[[], Callable[..., Tensor]]) -> Provider:
        def prepare() -> Run:
            return runner(maker(), sets(), d_ys())

        def note() -> str:
            if name != "sdpa" or device == "cpu":
                return ""
            sizes = ((shape.N, shape.d_qk), (shape.M, shape.d_qk), (shape.M, shape.d_v))
            q, k, v = (torch.empty(shape.B, *size, device=device, dtype=TORCH_DTYPES[dtype]) for size in sizes)
            return sdpa_choice(*(t.requires_grad_(backward) for t in (q, k, v)))

        return Provider(name, prepare, note)

    def truth() -> list[Tensor]:
        exact = [None if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in sets()[0]]
        return list(runner(chunked_truth(shape.pool), [exact], [d_y.double() for d_y in d_ys()[:1]])(0))

    return Case(
        "attention", shape.name, dtype, mode,
        [provider(name, maker) for name, maker in blocks(shape.pool, who or device).items()],
        truth, num_sets, config=vars(shape) | {"channels_last": True},
        own=lambda: [t for t in sets()[0] if t is not None],
        needs=(shape.flops(backward), shape.exps(backward), shape.bytes(dtype, backward)),
    )  # fmt: skip


def chunked_truth(pool: bool) -> Callable[..., Tensor]:
    """Return the eager block, four images at a time, so that float64 maps of 64x64 fit."""
    one = blocks(pool, "cpu")["eager"]()
    return lambda x, *weights: torch.cat([one(part, *weights) for part in x.split(4)])


def inputs(shape: BlockShape, dtype: str, device: str, seed: int) -> list[Tensor | None]:
    """Return x channels_last and the weights of the block, random, scaled so that logits are of order one."""
    rng = torch.Generator(device).manual_seed(seed)

    def draw(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(size, generator=rng, device=device) * scale).to(TORCH_DTYPES[dtype])

    C, small = shape.C, shape.C**-0.5
    x = draw(shape.B, C, shape.H, shape.W).contiguous(memory_format=torch.channels_last)
    weights = [draw(d, C, 1, 1, scale=small) for d in (shape.d_qk, shape.d_qk, shape.d_v)]
    w_o = draw(C, shape.d_v, 1, 1, scale=shape.d_v**-0.5) if shape.out_proj else None
    gamma = torch.full((), 0.5, device=device, dtype=TORCH_DTYPES[dtype])
    return [t if t is None else t.requires_grad_() for t in (x, *weights, w_o, gamma)]


def gradient(shape: BlockShape, dtype: str, device: str, seed: int = 0) -> Tensor:
    """Return the d_y that all providers get, (B, C, H, W) channels_last."""
    rng = torch.Generator(device).manual_seed(2**20 + seed)
    d_y = torch.randn(shape.B, shape.C, shape.H, shape.W, generator=rng, device=device).to(TORCH_DTYPES[dtype])
    return d_y.contiguous(memory_format=torch.channels_last)


def runner(function: Callable[..., Tensor], sets: Sequence[Sequence[Tensor | None]], d_ys: Sequence[Tensor]) -> Run:
    """Return what runs `function` on input set i, and with `d_ys`, one a set, its gradients for all inputs too."""

    def run(i: int) -> list[Tensor]:
        if not d_ys:
            with torch.no_grad():
                return [function(*sets[i])]
        y = function(*sets[i])
        return [y.detach(), *torch.autograd.grad(y, [t for t in sets[i] if t is not None], d_ys[i])]

    return run


def main(argv: Sequence[str] | None = None) -> int:
    """Measure on the device at hand and append the records; see benchmarks/run.py for the options."""
    from benchmarks.run import main as run

    return run(["--only", "attention", *(argv or sys.argv[1:])])


if __name__ == "__main__":
    sys.exit(main())
