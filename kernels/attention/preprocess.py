"""delta = rowsum(d_out * out), which attention's backward subtracts from d_out vᵀ; added up in float32.

Where attention is nearly even, d_out vᵀ - delta is a small difference of large numbers, and its sum over keys is zero.
An error of delta does not cancel in d_q, so `out` takes part with what it lost by rounding (docs/log.md, "Exact
gradients").

Grid: see kernels/tiles.py; a program owns BLOCK_N queries of one image.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..configs import LaunchConfig, lookup
from ..launch import Launch, Needs, accumulator_dtype, arch_of, launch, precision_of, size_of
from ..tiles import cdiv, grid_of, load_rows, locate, split


@triton.jit
def _bwd_preprocess_kernel(
    d_out_ptr, out_ptr, lost_ptr, delta_ptr,  # (B, N, D_V), (B, N, D_V), the same or None, (B, N)
    stride_d_out_b, stride_d_out_n, stride_d_out_d,
    N,
    D_V: tl.constexpr, FLAT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D_V: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    acc_dtype = delta_ptr.dtype.element_ty
    b, offs_n = locate(N, BLOCK_N, FLAT)
    mask_n = offs_n < N
    rows = b * N + offs_n
    d_out_ptr += b * stride_d_out_b
    d_out = load_rows(d_out_ptr, stride_d_out_n, stride_d_out_d, offs_n, mask_n, 0, D_V, BLOCK_D_V)
    out = load_rows(out_ptr, D_V, 1, rows, mask_n, 0, D_V, BLOCK_D_V).to(acc_dtype)
    if lost_ptr is not None:
        out += load_rows(lost_ptr, D_V, 1, rows, mask_n, 0, D_V, BLOCK_D_V).to(acc_dtype)
    delta = tl.sum(d_out.to(acc_dtype) * out, 1)
    if BLOCK_REST > 0:
        d_out = load_rows(d_out_ptr, stride_d_out_n, stride_d_out_d, offs_n, mask_n, BLOCK_D_V, D_V, BLOCK_REST)
        out = load_rows(out_ptr, D_V, 1, rows, mask_n, BLOCK_D_V, D_V, BLOCK_REST).to(acc_dtype)
        if lost_ptr is not None:
            out += load_rows(lost_ptr, D_V, 1, rows, mask_n, BLOCK_D_V, D_V, BLOCK_REST).to(acc_dtype)
        delta += tl.sum(d_out.to(acc_dtype) * out, 1)
    tl.store(delta_ptr + rows, delta, mask=mask_n)


def attention_bwd_preprocess(
    d_out: Tensor, out: Tensor, lost: Tensor | None = None, *, config: LaunchConfig | None = None
) -> Tensor:
    """Return delta (B, N), float32, from `d_out` (B, N, D_V) of any strides and `out`, contiguous, of one dtype.

    `lost` is what rounding took from `out`, like it.
    """
    B, N, D_V = out.shape
    precision = precision_of(out.dtype)
    delta = torch.empty((B, N), device=out.device, dtype=accumulator_dtype(out.dtype))

    def describe() -> Launch:
        chosen = config or lookup("attention_bwd_preprocess", arch_of(out), precision, 1, D_V)
        grid, (width, rest) = grid_of(cdiv(N, chosen.BLOCK_N), B), split(D_V)
        stride_b, stride_n, stride_d = d_out.stride()
        return Launch(
            grid,
            chosen,
            dict(stride_d_out_b=stride_b, stride_d_out_n=stride_n, stride_d_out_d=stride_d, N=N),
            dict(D_V=D_V, FLAT=len(grid) == 1, BLOCK_N=chosen.BLOCK_N, BLOCK_D_V=width, BLOCK_REST=rest),
            lambda: Needs(flops=2 * B * N * D_V, bytes_read=size_of(d_out, out, lost), bytes_written=size_of(delta)),
        )

    launch(
        "attention_bwd_preprocess",
        _bwd_preprocess_kernel,
        dict(d_out_ptr=d_out, out_ptr=out, lost_ptr=lost, delta_ptr=delta),
        (out.shape, d_out.stride(), precision, config),
        describe,
    )
    return delta
