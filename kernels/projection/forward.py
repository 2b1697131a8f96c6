"""k and v of the attention block from x in one pass: two 1x1 convolutions and their 2x2 max-pool.

k[b, m] = max over the window of m of W_phi x[b, :, n] + b_phi, v likewise with W_g; without pooling the window is the
position itself. Grid: cdiv(M, BLOCK_M) * B programs; one owns BLOCK_M pooled positions and goes through the four
window positions in turn, so every element of x is needed by one program only, and no reshaping of a product is.
Products accumulate in float32, maxima are taken on the float32 sums; of equal values the first wins, NaN wins over all
(`max_pool2d`'s rules). The winner's place in the window is kept in a byte: backward needs it, and computing it
anew would read x again, 2C bytes a position for (D_QK + D_V) / 4. Oracle: reference.project.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import Needs, arch_of, launch, precision_of, size_of
from .configs import ProjectionConfig, lookup_forward, padded


@triton.jit
def pixel_of(offs_m, j, W, POOL: tl.constexpr):
    """Position n in the map of place `j` (0..3, row by row) of the windows `offs_m`; without POOL, `offs_m`."""
    if POOL:
        W_pooled = W // 2
        return (offs_m // W_pooled * 2 + j // 2) * W + offs_m % W_pooled * 2 + j % 2
    else:
        return offs_m


@triton.jit
def _fwd_kernel(
    x_ptr, w_phi_ptr, w_g_ptr, b_phi_ptr, b_g_ptr,  # (B, C, N), (D_QK, C), (D_V, C), (D_QK,) or None, (D_V,) or None
    k_ptr, v_ptr, argmax_ptr,  # (B, M, D_QK), (B, M, D_V), (B, M, D_QK + D_V) or None
    stride_x_b, stride_x_c, stride_x_n,
    M, C, W,
    D_QK: tl.constexpr, D_V: tl.constexpr, POOL: tl.constexpr, EVEN_C: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D_QK: tl.constexpr, BLOCK_D_V: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    num_m = tl.cdiv(M, BLOCK_M)
    b = (tl.program_id(0) // num_m).to(tl.int64)
    offs_m = tl.program_id(0) % num_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_c = tl.arange(0, BLOCK_C)
    offs_qk = tl.arange(0, BLOCK_D_QK)
    offs_v = tl.arange(0, BLOCK_D_V)
    mask_m = offs_m < M
    mask_qk = offs_qk < D_QK
    mask_v = offs_v < D_V

    k = tl.full((BLOCK_M, BLOCK_D_QK), float("-inf"), ACC)
    v = tl.full((BLOCK_M, BLOCK_D_V), float("-inf"), ACC)
    argmax_k = tl.zeros((BLOCK_M, BLOCK_D_QK), tl.uint8)
    argmax_v = tl.zeros((BLOCK_M, BLOCK_D_V), tl.uint8)
    for j in range(4 if POOL else 1):
        offs_n = pixel_of(offs_m, j, W, POOL)
        x_tile = x_ptr + b * stride_x_b + offs_n[:, None] * stride_x_n
        acc_k = tl.zeros((BLOCK_M, BLOCK_D_QK), ACC)
        acc_v = tl.zeros((BLOCK_M, BLOCK_D_V), ACC)
        for start_c in tl.range(0, C, BLOCK_C):
            c = start_c + offs_c
            mask_c = (c < C) | EVEN_C
            x_ptrs = x_tile + c[None, :] * stride_x_c
            x = tl.load(x_ptrs, mask=mask_m[:, None] & mask_c[None, :], other=0.0).to(w_phi_ptr.dtype.element_ty)
            phi_ptrs = w_phi_ptr + c[:, None] + offs_qk[None, :] * C
            w_phi = tl.load(phi_ptrs, mask=mask_c[:, None] & mask_qk[None, :], other=0.0)
            g_ptrs = w_g_ptr + c[:, None] + offs_v[None, :] * C
            w_g = tl.load(g_ptrs, mask=mask_c[:, None] & mask_v[None, :], other=0.0)
            acc_k = tl.dot(x, w_phi, acc_k, input_precision=PRECISION, out_dtype=ACC)
            acc_v = tl.dot(x, w_g, acc_v, input_precision=PRECISION, out_dtype=ACC)
        if POOL:
            wins_k = (acc_k > k) | (acc_k != acc_k)
            wins_v = (acc_v > v) | (acc_v != acc_v)
            k = tl.where(wins_k, acc_k, k)
            v = tl.where(wins_v, acc_v, v)
            argmax_k = tl.where(wins_k, j, argmax_k).to(tl.uint8)
            argmax_v = tl.where(wins_v, j, argmax_v).to(tl.uint8)
        else:
            k = acc_k
            v = acc_v

    if b_phi_ptr is not None:
        k += tl.load(b_phi_ptr + offs_qk, mask=mask_qk, other=0.0)[None, :]
    if b_g_ptr is not None:
        v += tl.load(b_g_ptr + offs_v, mask=mask_v, other=0.0)[None, :]
    rows = b * M + offs_m
    mask_mk = mask_m[:, None] & mask_qk[None, :]
    mask_mv = mask_m[:, None] & mask_v[None, :]
    tl.store(k_ptr + rows[:, None] * D_QK + offs_qk[None, :], k.to(k_ptr.dtype.element_ty), mask=mask_mk)
    tl.store(v_ptr + rows[:, None] * D_V + offs_v[None, :], v.to(v_ptr.dtype.element_ty), mask=mask_mv)
    if argmax_ptr is not None:
        argmax_ptrs = argmax_ptr + rows[:, None] * (D_QK + D_V)
        tl.store(argmax_ptrs + offs_qk[None, :], argmax_k, mask=mask_mk)
        tl.store(argmax_ptrs + D_QK + offs_v[None, :], argmax_v, mask=mask_mv)


def dense(x: Tensor) -> Tensor:
    """Return `x` (B, C, H, W) itself where it is contiguous or channels_last, else a contiguous copy."""
    if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last):
        return x
    return x.contiguous()


def is_channels_last(x: Tensor) -> bool:
    """Whether a dense `x` (B, C, H, W) has its channels innermost; where both formats are the same memory, False."""
    return not x.is_contiguous()


def strides_of(x: Tensor) -> tuple[int, int, int]:
    """Return the strides of the axes B, C and N = H*W of a dense `x` (whose own strides lie where a size is 1)."""
    B, C, H, W = x.shape
    return (C * H * W, 1, C) if is_channels_last(x) else (C * H * W, H * W, 1)


def projection_fwd(
    x: Tensor,
    w_phi: Tensor,
    w_g: Tensor,
    b_phi: Tensor | None = None,
    b_g: Tensor | None = None,
    *,
    pool: bool,
    save_argmax: bool = True,
    config: ProjectionConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return k (B, M, D_QK), v (B, M, D_V) in the dtype of `w_phi`, and the pool's argmax (B, M, D_QK + D_V).

    `x` (B, C, H, W) of any float dtype, contiguous or channels_last; `w_phi` (D_QK, C), `w_g` (D_V, C), contiguous, and
    `b_phi` (D_QK,), `b_g` (D_V,) share a dtype, in which products are computed. M is H*W, or (H//2)*(W//2) with
    `pool`. The argmax, uint8 (0..3, row by row of the window), is None without `pool` or without `save_argmax`.
    """
    B, C, H, W = x.shape
    D_QK, D_V = w_phi.shape[0], w_g.shape[0]
    M = (H // 2) * (W // 2) if pool else H * W
    stride_x_b, stride_x_c, stride_x_n = strides_of(x)
    k = torch.empty((B, M, D_QK), device=x.device, dtype=w_phi.dtype)
    v = torch.empty((B, M, D_V), device=x.device, dtype=w_phi.dtype)
    argmax = None
    if pool and save_argmax:
        argmax = torch.empty((B, M, D_QK + D_V), device=x.device, dtype=torch.uint8)
    precision = precision_of(w_phi.dtype)
    config = config or lookup_forward(arch_of(x), precision, D_QK, D_V)
    window = 4 if pool else 1
    launch(
        "projection_fwd",
        _fwd_kernel,
        triton.cdiv(M, config.BLOCK_M) * B,
        config,
        dict(
            x_ptr=x, w_phi_ptr=w_phi, w_g_ptr=w_g, b_phi_ptr=b_phi, b_g_ptr=b_g,
            k_ptr=k, v_ptr=v, argmax_ptr=argmax,
            stride_x_b=stride_x_b, stride_x_c=stride_x_c, stride_x_n=stride_x_n,
            M=M, C=C, W=W,
        ),
        dict(
            D_QK=D_QK, D_V=D_V, POOL=pool, EVEN_C=C % config.BLOCK_C == 0,
            BLOCK_M=config.BLOCK_M, BLOCK_C=config.BLOCK_C, BLOCK_D_QK=padded(D_QK), BLOCK_D_V=padded(D_V),
            PRECISION="tf32" if precision == "tf32" else "ieee", ACC=tl.float64 if precision == "fp64" else tl.float32,
        ),
        lambda: Needs(
            flops=2 * B * window * M * C * (D_QK + D_V),
            bytes_read=size_of(x, w_phi, w_g, b_phi, b_g),
            bytes_written=size_of(k, v, argmax),
            loops=(window, window * triton.cdiv(C, config.BLOCK_C)),
        ),
    )  # fmt: skip
    return k, v, argmax
