"""Every launch that the shipped configs make for the standard shapes: what the report compiles.

The launchers themselves run, on tensors without memory, while `kernels/launch.py` records.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks.shapes import BLOCK_SHAPES, SAGAN_MATRICES, BlockShape
from sagan_fast.kernels.attention.backward import attention_bwd
from sagan_fast.kernels.attention.forward import attention_fwd
from sagan_fast.kernels.attention.second import attention_second
from sagan_fast.kernels.attention.tangent import attention_tangent
from sagan_fast.kernels.batch_norm.backward import (
    batch_norm_bwd_input,
    batch_norm_bwd_sums,
    batch_norm_bwd_tables,
    batch_norm_bwd_totals,
)
from sagan_fast.kernels.batch_norm.forward import batch_norm_fwd, batch_norm_moments
from sagan_fast.kernels.configs import INTERPRETED_ARCH as HOPPER
from sagan_fast.kernels.configs import Arch, has_rows
from sagan_fast.kernels.launch import DTYPES, Plan, recording
from sagan_fast.kernels.self_attention.backward import self_attention_bwd
from sagan_fast.kernels.self_attention.forward import self_attention_fwd
from sagan_fast.kernels.self_attention.inputs import BlockInputs
from sagan_fast.kernels.spectral_norm.backward import spectral_norm_bwd
from sagan_fast.kernels.spectral_norm.forward import spectral_norm_fwd
from sagan_fast.kernels.spectral_norm.norms import scale_spectral_norms, spectral_norms

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


def _empty(dtype: str, *size: int) -> torch.Tensor:
    return torch.empty(size, dtype=DTYPES[dtype], device="meta")


def block_plans(
    B: int,
    C: int,
    H: int,
    W: int,
    D_QK: int,
    D_V: int,
    *,
    pool: bool = True,
    out_proj: bool = True,
    bias: bool = False,
    dtype: str = "bf16",
    arch: Arch = HOPPER,
    channels_last: bool = True,
    backward: bool = True,
) -> list[Plan]:
    """Return the launches of the whole block on x (B, C, H, W), forward and with `backward` those of its backward too.

    `dtype` is "fp32", "tf32", "fp16" or "bf16".
    """
    empty = partial(_empty, dtype)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    x = empty(B, C, H, W).contiguous(memory_format=memory_format)
    biases = [empty(D) if bias else None for D in (D_QK, D_QK, D_V, C)]
    w_o = empty(C, D_V) if out_proj else None
    if not out_proj:
        biases[3] = None
    gamma = torch.empty((), device="meta")
    inputs = BlockInputs(x, empty(D_QK, C), empty(D_QK, C), empty(D_V, C), w_o, gamma, *biases)
    with recording(arch, dtype) as found:
        y, saved = self_attention_fwd(inputs, pool=pool, save=backward)
        if saved is not None:
            self_attention_bwd(y, inputs, saved)
    return found.plans


def block_launches(shape: BlockShape, dtype: str, arch: Arch, channels_last: bool = True) -> list[Launch]:
    """The launches of a block: inference, forward and backward in training, each in order."""

    def record(backward: bool) -> list[Plan]:
        return block_plans(
            shape.B, shape.C, shape.H, shape.W, shape.d_qk, shape.d_v,
            pool=shape.pool, out_proj=shape.out_proj, bias=shape.bias,
            dtype=dtype, arch=arch, channels_last=channels_last, backward=backward,
        )  # fmt: skip

    inference = [Launch(plan, shape.name, INFERENCE) for plan in record(False)]
    training = [Launch(plan, shape.name, BACKWARD if "bwd" in plan.name else FORWARD) for plan in record(True)]
    return inference + training


def functional_launches(shape: BlockShape, dtype: str, arch: Arch) -> list[Launch]:
    """The launches of `functional.attention`, forward and backward, on q, k, v of the shape."""
    rows = ((shape.N, shape.d_qk), (shape.M, shape.d_qk), (shape.M, shape.d_v))
    q, k, v = (_empty(dtype, shape.B, *size) for size in rows)
    with recording(arch, dtype) as found:
        out, lse, lost = attention_fwd(q, k, v)
        assert lse is not None
        attention_bwd(torch.empty_like(out), q, k, v, out, lse, lost)
    return [Launch(plan, shape.name, FUNCTIONAL) for plan in found.plans]


def width_plans(D_QK: int, D_V: int, side: int, dtype: str, arch: Arch) -> list[Plan]:
    """Return launches of blocks of this width on maps of `side` x `side` and one row less.

    Even and ragged maps, pooled and not, with and without biases and output projection, in both memory formats.
    """
    found = []
    for pool, ragged, bias, channels_last in (
        (True, 0, False, True), (True, 1, False, True), (True, 1, True, False), (False, 1, True, True)
    ):  # fmt: skip
        found += block_plans(
            2, max(32, 2 * D_V) if pool else D_V, side - ragged, side, D_QK, D_V, pool=pool, out_proj=pool,
            bias=bias, dtype=dtype, arch=arch, channels_last=channels_last,
        )  # fmt: skip
    return found


def second_plans(B: int, N: int, M: int, D_QK: int, D_V: int, dtype: str = "bf16", arch: Arch = HOPPER) -> list[Plan]:
    """Return the launches of attention's second backward after a forward, but for what chunks take the place of."""
    q, k, v = (_empty(dtype, B, *size) for size in ((N, D_QK), (M, D_QK), (M, D_V)))
    with recording(arch, dtype) as found:
        out, lse, lost = attention_fwd(q, k, v)
        assert lse is not None
        before = len(found.plans)
        if has_rows("attention_second_dkv", dtype, D_QK, D_V):
            attention_second(torch.empty_like(out), q, k, v, out, lse, lost, q, k, v)
        else:
            attention_tangent(q, k, v, out, lse, lost, q, k, v)
    return [plan for plan in found.plans[before:] if "preprocess" not in plan.name]


def spectral_norm_plans(
    matrices: Sequence[tuple[int, int]], dtype: str = "fp32", out_dtype: str = "fp32", arch: Arch = HOPPER
) -> list[Plan]:
    """Return every launch of W/sigma and of its gradient for `matrices` (R, K), each once.

    `dtype` of the weights, `out_dtype` of W/sigma and of the gradient that comes back: "fp32", "fp16" or "bf16". Both
    orders of the iteration, the second iteration and the evaluation, which only reads u and v, are among them.
    """
    weights = [_empty(dtype, R, K) for R, K in matrices]
    us, vs = [_empty("fp32", R) for R, _ in matrices], [_empty("fp32", K) for _, K in matrices]
    with recording(arch, dtype) as found:
        for options in (dict(n_power_iterations=2), dict(update=False), dict(v_first=True, n_power_iterations=2)):
            kept = spectral_norm_fwd(weights, us, vs, out_dtype=DTYPES[out_dtype], **options)
        grads = [_empty(out_dtype, R, K) for R, K in matrices]
        spectral_norm_bwd(grads, weights, kept.sigmas, kept.u, kept.v)
    return [plan for i, plan in enumerate(found.plans) if plan not in found.plans[:i]]


def norms_plans(matrices: Sequence[tuple[int, int]], dtype: str = "fp32", arch: Arch = HOPPER) -> list[Plan]:
    """Return every launch of sigma and of scaling in place for updates of `dtype`, each once.

    The updates are `matrices` (R, K) and a stack of three of the first.
    """
    R, K = matrices[0]
    tensors = [*(_empty(dtype, *matrix) for matrix in matrices), _empty(dtype, 3, R, K)]
    us = [*(_empty("fp32", R) for R, _ in matrices), _empty("fp32", 3, R)]
    vs = [*(_empty("fp32", K) for _, K in matrices), _empty("fp32", 3, K)]
    are_stacks = [tensor.ndim == 3 for tensor in tensors]
    with recording(arch, dtype) as found:
        for options in ({}, {"update": False}, {"v_first": True}):
            sigmas = spectral_norms(tensors, us, vs, **options)
        for targets in (1.0, sigmas):
            scale_spectral_norms(tensors, are_stacks, sigmas, targets)
    return [plan for i, plan in enumerate(found.plans) if plan not in found.plans[:i]]


def spectral_norm_launches(arch: Arch) -> list[Launch]:
    """Return the launches that normalise all 44 matrices of SAGAN, and those of the gradient.

    "forward" is one training update. Other orders, evaluation, further iterations, and the table of addresses, written
    when a weight moved, are "variant", and so are norms of updates.
    """
    found = []
    for out_dtype in ("fp32", "bf16"):
        for plan in spectral_norm_plans(SAGAN_MATRICES, "fp32", out_dtype, arch):
            values = plan.constexprs
            other = "v first" in plan.name or "addresses" in plan.name
            update = values.get("FIRST", True) and values.get("UPDATE", True) and not other
            part = BACKWARD if "gradient" in plan.name else FORWARD if update else VARIANT
            found.append(Launch(plan, f"{MATRICES} to {out_dtype}", part))
    for dtype in ("fp32", "bf16"):
        plans = norms_plans(SAGAN_MATRICES, dtype, arch)
        found += [Launch(plan, f"{MATRICES}, updates in {dtype}", VARIANT) for plan in plans]
    return found


def batch_norm_plans(
    shape: tuple[int, int, int, int], num_classes: int | None, dtype: str = "bf16", arch: Arch = HOPPER,
    channels_last: bool = True, training: bool = True,
) -> list[Plan]:  # fmt: skip
    """Return the launches of batch norm + ReLU of a map of `shape` (B, C, H, W), forward and backward.

    With `num_classes` gains and biases are tables, with 0 one for all images, with None one an image. Without
    `training` the statistics are running averages.
    """
    B, C, H, W = shape
    x = _empty(dtype, *shape).contiguous(
        memory_format=torch.channels_last if channels_last else torch.contiguous_format
    )
    mean, var = _empty("fp32", C), _empty("fp32", C)
    size = (C,) if num_classes == 0 else (num_classes or B, C)
    gain, bias = _empty("fp32", *size), _empty("fp32", *size)
    classes = torch.empty(B, dtype=torch.int64, device="meta") if num_classes else None
    form = dict(eps=1e-5, relu=True, one_plus=not training)
    with recording(arch, dtype) as found:
        if training:
            mean, var = batch_norm_moments(x, mean, var, 0.1)
        out = batch_norm_fwd(x, mean, var, gain, bias, classes, **form)
        sums = batch_norm_bwd_sums(out, x, mean, var, gain, bias, classes, **form)
        batch_norm_bwd_tables(sums, x, gain, bias, classes)
        totals = batch_norm_bwd_totals(sums, x, gain, classes, factor=1 / (B * H * W)) if training else None
        batch_norm_bwd_input(out, x, mean, var, gain, bias, classes, totals, **form)
    return found.plans


BATCH_NORM_SHAPES = ((64, 1024, 4, 4), (64, 256, 32, 32), (64, 64, 128, 128))
"""The first, the middle and the last map of the official generator at 128x128."""


def batch_norm_launches(dtype: str, arch: Arch, channels_last: bool = True) -> list[Launch]:
    """Return the launches of conditional batch norm + ReLU with 1000 classes on maps of the official generator."""
    return [
        Launch(plan, "batch-norm-" + "x".join(map(str, shape)), BACKWARD if "bwd" in plan.name else FORWARD)
        for shape in BATCH_NORM_SHAPES
        for plan in batch_norm_plans(shape, 1000, dtype, arch, channels_last)
    ]


def launches(arch: Arch, channels_last: bool = True) -> list[Launch]:
    """All launches of all ops for `arch`, blocks on channels_last maps or on contiguous ones."""
    found = []
    for shape in BLOCK_SHAPES:
        for dtype in BLOCK_DTYPES:
            found += block_launches(shape, dtype, arch, channels_last) + functional_launches(shape, dtype, arch)
    for dtype in ("bf16", "fp32"):
        found += batch_norm_launches(dtype, arch, channels_last)
    return found + spectral_norm_launches(arch)
