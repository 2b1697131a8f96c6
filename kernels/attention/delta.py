"""delta = rowsum(d_o * o) of attention's backward, for the block with d_o, the gradient before W_o, and d_gamma.

d_o = gamma * d_y W_o is stored, D_V wide, since every block of keys reads it; each program's share of
d_gamma = sum of (d_y W_o) * o is the same product. Grid: kernels/tiles.py. Products and sums accumulate in float32.
Oracle: autograd through reference.attention.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import Launch, Needs, arch_of, launch, precision_of, size_of
from ..tiles import arithmetic, cdiv, grid_of, load_chunk, load_rows, load_weight, locate, split, store_rows
from .configs import DeltaConfig, lookup_delta


@triton.jit
def round_as(values, ptr):
    """`values` as they are read back once stored at `ptr`."""
    return values.to(ptr.dtype.element_ty).to(values.dtype)


@triton.jit
def _bwd_delta_kernel(
    d_y_ptr, w_o_ptr, b_o_ptr, o_ptr, gamma_ptr,  # (B, C, N), (C, D_V) or None, (C,) or None, (B, N, D_V), one or None
    d_o_ptr, delta_ptr, d_gamma_ptr,  # (B, N, D_V) or None, (B, N), (programs,) or None
    stride_d_y_b, stride_d_y_c, stride_d_y_n,
    N, C,
    D_V: tl.constexpr, EVEN_C: tl.constexpr, FLAT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D_V: tl.constexpr, BLOCK_REST: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    b, offs_n = locate(N, BLOCK_N, FLAT)
    mask_n = offs_n < N
    rows = b * N + offs_n
    d_y_tile = d_y_ptr + b * stride_d_y_b
    through_bias = tl.zeros((BLOCK_N,), ACC)
    if w_o_ptr is not None:
        d_y_tile += offs_n[:, None].to(tl.int64) * stride_d_y_n
        d_o = tl.zeros((BLOCK_N, BLOCK_D_V), ACC)
        if BLOCK_REST > 0:
            d_rest = tl.zeros((BLOCK_N, BLOCK_REST), ACC)
        for start_c in tl.range(0, C, BLOCK_C):
            c = start_c + tl.arange(0, BLOCK_C)
            mask_c = (c < C) | EVEN_C
            d_y = load_chunk(d_y_tile, stride_d_y_c, c.to(tl.int64), mask_c, mask_n)
            w = load_weight(w_o_ptr, D_V, 1, c, mask_c, 0, D_V, BLOCK_D_V)
            d_o = tl.dot(d_y.to(w.dtype), w, d_o, input_precision=PRECISION, out_dtype=ACC)
            if BLOCK_REST > 0:
                w = load_weight(w_o_ptr, D_V, 1, c, mask_c, BLOCK_D_V, D_V, BLOCK_REST)
                d_rest = tl.dot(d_y.to(w.dtype), w, d_rest, input_precision=PRECISION, out_dtype=ACC)
            if b_o_ptr is not None:
                b_o = tl.load(b_o_ptr + c, mask=mask_c, other=0.0)
                through_bias += tl.sum(d_y.to(ACC) * b_o[None, :].to(ACC), 1)
    else:
        d_o = load_rows(d_y_tile, stride_d_y_n, stride_d_y_c, offs_n, mask_n, 0, D_V, BLOCK_D_V).to(ACC)
        if BLOCK_REST > 0:
            d_rest = load_rows(d_y_tile, stride_d_y_n, stride_d_y_c, offs_n, mask_n, BLOCK_D_V, D_V, BLOCK_REST).to(ACC)
    o = load_rows(o_ptr, D_V, 1, rows, mask_n, 0, D_V, BLOCK_D_V).to(ACC)
    if BLOCK_REST > 0:
        o_rest = load_rows(o_ptr, D_V, 1, rows, mask_n, BLOCK_D_V, D_V, BLOCK_REST).to(ACC)
    if gamma_ptr is not None:
        through_o = tl.sum(d_o * o, 1)
        gamma = tl.load(gamma_ptr).to(ACC)
        d_o = round_as(d_o * gamma, d_o_ptr)  # delta is of what the products d_o vᵀ are of
        store_rows(d_o_ptr, D_V, d_o, rows, mask_n, 0, D_V, BLOCK_D_V)
        if BLOCK_REST > 0:
            through_o += tl.sum(d_rest * o_rest, 1)
            d_rest = round_as(d_rest * gamma, d_o_ptr)
            store_rows(d_o_ptr, D_V, d_rest, rows, mask_n, BLOCK_D_V, D_V, BLOCK_REST)
        program = tl.program_id(0) if FLAT else b * tl.num_programs(0) + tl.program_id(0)
        # along all axes: on what tcgen05 products gave, Triton 3.6 fails to compile it along axis 0
        tl.store(d_gamma_ptr + program, tl.sum(through_o + through_bias))
    delta = tl.sum(d_o * o, 1)
    if BLOCK_REST > 0:
        delta += tl.sum(d_rest * o_rest, 1)
    tl.store(delta_ptr + rows, delta, mask=mask_n)


def delta_bwd(
    d_y: Tensor,
    strides: tuple[int, int, int],
    w_o: Tensor | None,
    b_o: Tensor | None,
    o: Tensor,
    gamma: Tensor | None,
    config: DeltaConfig | None,
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """Return d_o like `o` (None without `gamma`), delta (B, N) and d_gamma () of d_y with strides of B, C, N."""
    (B, N, D_V), C = o.shape, o.shape[2] if w_o is None else w_o.shape[0]
    precision = precision_of(o.dtype)
    acc_dtype = torch.float64 if precision == "fp64" else torch.float32
    config = config or lookup_delta(arch_of(o), precision, D_V)
    tiles = cdiv(N, config.BLOCK_N)
    delta = torch.empty((B, N), device=o.device, dtype=acc_dtype)
    d_o = d_gamma = None
    if gamma is not None:
        d_o = torch.empty_like(o)
        d_gamma = torch.empty((tiles * B,), device=o.device, dtype=acc_dtype)

    def describe() -> Launch:
        grid, (width, rest) = grid_of(tiles, B), split(D_V)
        return Launch(
            grid,
            config,
            dict(
                stride_d_y_b=strides[0], stride_d_y_c=strides[1], stride_d_y_n=strides[2],
                N=N, C=C,
            ),
            dict(
                D_V=D_V, EVEN_C=C % config.BLOCK_C == 0, FLAT=len(grid) == 1,
                BLOCK_N=config.BLOCK_N, BLOCK_C=config.BLOCK_C, BLOCK_D_V=width, BLOCK_REST=rest,
                **arithmetic(precision),
            ),
            lambda: Needs(
                flops=2 * B * N * D_V * (1 if w_o is None else C + 1),
                bytes_read=size_of(d_y, w_o, b_o, o, gamma),
                bytes_written=size_of(d_o, delta, d_gamma),
                loops=() if w_o is None else (cdiv(C, config.BLOCK_C),),
            ),
        )  # fmt: skip

    tensors = dict(
        d_y_ptr=d_y, w_o_ptr=w_o, b_o_ptr=b_o, o_ptr=o, gamma_ptr=gamma,
        d_o_ptr=d_o, delta_ptr=delta, d_gamma_ptr=d_gamma,
    )  # fmt: skip
    key = (B, N, C, D_V, strides, precision, config)
    launch("attention_bwd_delta", _bwd_delta_kernel, tensors, key, describe)
    return d_o, delta, None if d_gamma is None else d_gamma.sum()
