"""Measure candidate configs of the attention and projection kernels on the GPU at hand; print rows for the tables.

    python -m benchmarks.tune [--dtype bf16] [--shape feat64-G-64x64-C128] [--kernel fwd] [--dry-run]

For every kernel and shape each candidate's result is first held against the shipped config's, then timed; the fastest
is printed in the form of `kernels/*/configs.py`, beside the shipped one and both times. Nothing is written to the
tables: a row serves several shapes, so a person decides. `--dry-run` lists the candidates and needs no GPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import astuple
from itertools import product
from typing import Any

import torch
from torch import Tensor

from benchmarks.shapes import BLOCK_SHAPES, BlockShape
from sagan_fast.kernels.attention.backward import block_bwd
from sagan_fast.kernels.attention.configs import AttentionConfig, DeltaConfig
from sagan_fast.kernels.attention.forward import block_fwd
from sagan_fast.kernels.launch import DTYPES
from sagan_fast.kernels.projection.configs import ProjectionConfig, table_width
from sagan_fast.kernels.projection.forward import projection_fwd
from sagan_fast.testing import RMS_TOLERANCE, rel_rms

KERNELS = ("projection", "forward", "delta", "dkv", "dq")


def candidates(kernel: str) -> Iterator[Any]:
    """Yield every config of `kernel` worth a measurement; what does not fit a GPU is skipped when it is compiled."""
    for warps, stages in product((4, 8), (1, 2, 3)):
        if kernel == "projection":
            yield from (ProjectionConfig(m, c, warps, stages) for m, c in product((32, 64, 128), (32, 64)))
        elif kernel == "delta":
            yield from (DeltaConfig(n, c, warps, stages) for n, c in product((32, 64, 128), (32, 64)))
        else:
            chunk = 64 if kernel == "forward" else 0
            yield from (
                AttentionConfig(n, m, chunk, warps, stages) for n, m in product((32, 64, 128), (32, 64, 128, 256))
            )


def runner(kernel: str, shape: BlockShape, dtype: torch.dtype) -> Callable[[Any], tuple[Tensor | None, ...]]:
    """Return a function of a config (None for the shipped one) that runs `kernel` on random tensors of `shape`."""
    generator = torch.Generator("cuda").manual_seed(0)

    def randn(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(size, device="cuda", generator=generator) * scale).to(dtype)

    C = shape.C
    x, d_y = (randn(shape.B, C, shape.H, shape.W).contiguous(memory_format=torch.channels_last) for _ in range(2))
    w_theta, w_phi, w_g = (randn(d, C, scale=C**-0.5) for d in (shape.d_qk, shape.d_qk, shape.d_v))
    w_o = randn(C, shape.d_v, scale=shape.d_v**-0.5) if shape.out_proj else None
    gamma = torch.full((), 0.7, device="cuda")
    q, k, v, argmax = projection_fwd(x, w_theta, w_phi, w_g, pool=shape.pool)
    _, o, lse = block_fwd(x, q, k, v, w_o, gamma)
    assert o is not None and lse is not None
    w_qkv = torch.cat([w_theta, w_phi, w_g])

    def run(config: Any) -> tuple[Tensor | None, ...]:
        if kernel == "projection":
            return projection_fwd(x, w_theta, w_phi, w_g, pool=shape.pool, config=config)
        if kernel == "forward":
            return block_fwd(x, q, k, v, w_o, gamma, config=config)
        # the other kernels of the backward keep their configs, so that differences are this one's
        options = {f"{kernel}_config": config}
        return block_bwd(
            d_y, x, w_qkv, w_o, None, gamma, q, k, v, o, lse, argmax, need_weights=False, need_biases=False, **options
        )

    return run


def agrees(found: tuple[Tensor | None, ...], shipped: tuple[Tensor | None, ...], dtype: str) -> bool:
    """Whether all floating tensors are as near to the shipped config's as the precision lets them be."""
    return all(
        rel_rms(a, b) <= 2 * RMS_TOLERANCE[dtype]
        for a, b in zip(found, shipped, strict=True)
        if a is not None and b is not None and a.is_floating_point()
    )


def tune(kernel: str, shape: BlockShape, dtype: str) -> str:
    """Measure all candidates of `kernel` on `shape`; return the row to put in the table, with both times."""
    from triton.testing import do_bench

    run = runner(kernel, shape, DTYPES[dtype])
    shipped = run(None)
    before = do_bench(lambda: run(None), return_mode="median")
    best, fastest = None, before
    for config in candidates(kernel):
        try:
            found = run(config)
        except Exception as error:  # too large for registers or shared memory, or a shape the compiler refuses
            print(f"  {astuple(config)}: {type(error).__name__}", file=sys.stderr)
            continue
        if not agrees(found, shipped, dtype):
            print(f"  {astuple(config)}: WRONG, not considered", file=sys.stderr)
            continue
        time = do_bench(lambda config=config: run(config), return_mode="median")
        if time < fastest:
            best, fastest = config, time
    width = table_width("tune", shape.d_qk, shape.d_v)
    row = "shipped" if best is None else str(astuple(best))
    return f"{kernel} {dtype} {width} {shape.name}: {row}  {1e3 * fastest:.1f} us, shipped {1e3 * before:.1f} us"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status, 1 where there is no GPU to measure on."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__.split("\n\n")[0])
    parser.add_argument("--dtype", choices=sorted(RMS_TOLERANCE), default="bf16")
    parser.add_argument("--shape", action="append", choices=[s.name for s in BLOCK_SHAPES], help="may be repeated")
    parser.add_argument("--kernel", action="append", choices=KERNELS, help="may be repeated")
    parser.add_argument("--dry-run", action="store_true", help="list the candidates; needs no GPU")
    options = parser.parse_args(arguments)
    kernels = options.kernel or KERNELS
    if options.dry_run:
        for kernel in kernels:
            for config in candidates(kernel):
                print(kernel, config)
        return 0
    if not torch.cuda.is_available():
        print("benchmarks.tune: needs a CUDA device (or --dry-run)", file=sys.stderr)
        return 1
    torch.set_float32_matmul_precision("high" if options.dtype == "tf32" else "highest")
    print(f"{torch.cuda.get_device_name()}, capability {torch.cuda.get_device_capability()}, torch {torch.__version__}")
    for shape in BLOCK_SHAPES:
        if options.shape is None or shape.name in options.shape:
            for kernel in kernels:
                print(tune(kernel, shape, options.dtype), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
