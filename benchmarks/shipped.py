"""Every launch that the shipped configs make for the standard shapes: what the report compiles and models.

`plans` of each op's configs run the launchers, on tensors without memory, while `kernels/launch.py` records.
"""

from __future__ import annotations

from dataclasses import dataclass

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
    from sagan_fast.kernels.attention.configs import plans

    def record(backward: bool) -> list[Plan]:
        return plans(
            shape.B, shape.C, shape.H, shape.W, shape.d_qk, shape.d_v,
            pool=shape.pool, out_proj=shape.out_proj, bias=shape.bias,
            dtype=dtype, arch=arch, channels_last=channels_last, backward=backward,
        )  # fmt: skip

    inference = [Launch(plan, shape.name, INFERENCE) for plan in record(False)]
    training = [Launch(plan, shape.name, BACKWARD if "bwd" in plan.name else FORWARD) for plan in record(True)]
    return inference + training


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
