"""Every launch that the shipped configs make for the standard shapes: what the report compiles and models.

The launchers are run, on tensors without memory, while `kernels/launch.py` records.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.shapes import BLOCK_SHAPES, ELEMENT_BYTES, SAGAN_MATRICES, BlockShape
from sagan_fast.kernels.plan import Plan

BLOCK_DTYPES = ("bf16", "fp16", "tf32", "fp32")
MATRICES = "sagan-44-matrices"
"""Name of the spectral-norm workload in the report."""

INFERENCE, FORWARD, BACKWARD = "inference", "forward", "backward"
"""Forward that keeps nothing, forward that keeps what backward needs, backward."""
FUNCTIONAL, VARIANT = "functional", "variant"
"""Attention on given q, k, v; what runs instead of the others."""


@dataclass(frozen=True)
class Launch:
    """A plan with what it is for: the shape's name and the part of the work."""

    plan: Plan
    shape: str
    part: str


def block_launches(shape: BlockShape, dtype: str, arch: int, channels_last: bool = True) -> list[Launch]:
    """The launches of a block: inference, forward and backward in training, each in order."""
    from sagan_fast.kernels.attention.backward import block_bwd
    from sagan_fast.kernels.attention.forward import block_fwd
    from sagan_fast.kernels.launch import DTYPES, recording
    from sagan_fast.kernels.projection.forward import projection_fwd

    def empty(*size: int) -> torch.Tensor:
        return torch.empty(size, dtype=DTYPES[dtype], device="meta")

    C, d_qk, d_v = shape.C, shape.d_qk, shape.d_v
    x = empty(shape.B, C, shape.H, shape.W)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    w_theta, w_phi, w_g, w_qkv = empty(d_qk, C), empty(d_qk, C), empty(d_v, C), empty(2 * d_qk + d_v, C)
    w_o = empty(C, d_v) if shape.out_proj else None
    b_theta, b_phi, b_g = (empty(d) if shape.bias else None for d in (d_qk, d_qk, d_v))
    b_o = empty(C) if shape.bias and shape.out_proj else None
    gamma = torch.empty((), device="meta")

    def forward(keep: bool) -> tuple[Any, ...]:
        k, v, argmax = projection_fwd(x, w_phi, w_g, b_phi, b_g, pool=shape.pool, save_argmax=keep)
        y, q, o, lse = block_fwd(x, w_theta, k, v, w_o, gamma, b_theta, b_o, save=keep)
        return y, q, k, v, o, lse, argmax

    kept: list[Any] = []

    def backward() -> None:
        y, *saved = kept
        block_bwd(torch.empty_like(y), x, w_qkv, w_o, b_o, gamma, *saved)

    def record(part: str, run: Callable[[], Any]) -> list[Launch]:
        with recording(arch, dtype) as found:
            result = run()
        kept[:] = result or ()
        return [Launch(plan, shape.name, part) for plan in found.plans]

    return [
        *record(INFERENCE, lambda: forward(False)),
        *record(FORWARD, lambda: forward(True)),
        *record(BACKWARD, backward),
    ]


def functional_launches(shape: BlockShape, dtype: str, arch: int) -> list[Launch]:
    """The launches of `functional.attention`, forward and backward, on q, k, v of the shape."""
    from sagan_fast.kernels.attention.backward import attention_bwd
    from sagan_fast.kernels.attention.forward import attention_fwd
    from sagan_fast.kernels.launch import DTYPES, recording

    def empty(*size: int) -> torch.Tensor:
        return torch.empty(size, dtype=DTYPES[dtype], device="meta")

    rows = ((shape.N, shape.d_qk), (shape.M, shape.d_qk), (shape.M, shape.d_v))
    q, k, v = (empty(shape.B, *size) for size in rows)
    with recording(arch, dtype) as found:
        out, lse = attention_fwd(q, k, v)
        assert lse is not None
        attention_bwd(torch.empty_like(out), q, k, v, out, lse)
    return [Launch(plan, shape.name, FUNCTIONAL) for plan in found.plans]


def library_products(shape: BlockShape, dtype: str) -> list[tuple[int, int]]:
    """FLOP and bytes of the backward products that PyTorch's library computes: dx, dW_theta,phi,g and dW_o."""
    n, D, size = shape.B * shape.N, 2 * shape.d_qk + shape.d_v, ELEMENT_BYTES[dtype]
    products = [
        (2 * n * D * shape.C, size * n * (D + 2 * shape.C)),
        (2 * n * D * shape.C, size * n * (D + shape.C)),
    ]
    if shape.out_proj:
        products.append((2 * n * shape.d_v * shape.C, size * n * (shape.d_v + shape.C)))
    return products


def spectral_norm_launches(arch: int) -> list[Launch]:
    """The launches that normalise all 44 matrices of SAGAN, and those of the gradient.

    "forward" is one training update; other orders, evaluation and further iterations are "variant".
    """
    from sagan_fast.kernels.spectral_norm.configs import plans

    matrices = [(matrix.R, matrix.K) for matrix in SAGAN_MATRICES]
    found = []
    for out_dtype in ("fp32", "bf16"):
        for plan in plans(matrices, dtype="fp32", out_dtype=out_dtype, arch=arch):
            values = plan.constexprs
            update = values.get("FIRST", True) and values.get("ADVANCE", True) and "v first" not in plan.name
            part = BACKWARD if "gradient" in plan.name else FORWARD if update else VARIANT
            found.append(Launch(plan, f"{MATRICES} to {out_dtype}", part))
    return found


def launches(arch: int, channels_last: bool = True) -> list[Launch]:
    """All launches of all ops for `arch`, blocks on channels_last maps or on contiguous ones."""
    found = []
    for shape in BLOCK_SHAPES:
        for dtype in BLOCK_DTYPES:
            found += block_launches(shape, dtype, arch, channels_last) + functional_launches(shape, dtype, arch)
    return found + spectral_norm_launches(arch)
