"""q, k and v of the attention block from x in one pass: three 1x1 convolutions, with the 2x2 max-pool of k and v.

q[b, n] = W_theta x[b, :, n] + b_theta. k[b, m] is the maximum over the window of m of W_phi x[b, :, n] + b_phi, v
likewise with W_g. Without pooling the window is the position itself.

Grid: see kernels/tiles.py. A program owns BLOCK_M windows and goes through their four positions in turn, so no product
is reshaped. If one chunk holds all channels of x (WHOLE), the weights are read once for all four positions.
`x + 0.0` keeps x in registers; otherwise every dot reads it from shared memory again (Triton 3.6 to 3.9).
Products accumulate in float32, and maxima are taken of the float32 sums. As in `max_pool2d`, the first of equal values
wins and NaN wins over all. The winner's place is kept in a byte, because backward would otherwise read x again: 2C
bytes a position instead of (D_QK + D_V) / 4. Why q is made here and not beside attention: docs/log.md.
Oracle: reference.project.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import check_contiguous
from ..configs import LaunchConfig, lookup
from ..launch import Launch, Needs, arch_of, launch, precision_of, size_of
from ..tiles import (
    arithmetic,
    cdiv,
    grid_of,
    is_channels_last,
    load_bias,
    load_chunk,
    load_weight,
    locate,
    padded,
    split,
    store_rows,
    strides_of,
)


@triton.jit
def pixel_of(offs_m, j, W, W_windows, POOL: tl.constexpr):
    """Return the position n in the map of place `j` (0..3, row by row) of the windows `offs_m`.

    There are `W_windows` windows in a row of the map. Without POOL the result is `offs_m`.
    """
    if POOL:
        return (offs_m // W_windows * 2 + j // 2) * W + offs_m % W_windows * 2 + j % 2
    else:
        return offs_m


@triton.jit
def _fwd_kernel(
    x_ptr, w_theta_ptr, w_phi_ptr, w_g_ptr,  # (B, C, N), (D_QK, C), (D_QK, C), (D_V, C)
    b_theta_ptr, b_phi_ptr, b_g_ptr,  # (D_QK,), (D_QK,), (D_V,), or None
    q_ptr, k_ptr, v_ptr, argmax_ptr,  # (B, N, D_QK), (B, M, D_QK), (B, M, D_V), (B, M, D_QK + D_V) or None
    stride_x_b, stride_x_c, stride_x_n,
    N, M, C, H, W,
    D_QK: tl.constexpr, D_V: tl.constexpr, POOL: tl.constexpr, EVEN_C: tl.constexpr, EVEN_HW: tl.constexpr,
    WHOLE: tl.constexpr, FLAT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D_QK: tl.constexpr,
    BLOCK_D_V: tl.constexpr, BLOCK_REST: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    dtype = w_phi_ptr.dtype.element_ty
    W_windows = (W + 1) // 2
    windows = (H + 1) // 2 * W_windows if POOL else N  # those cut by the edge too: their positions have queries
    b, offs_w = locate(windows, BLOCK_M, FLAT)
    offs_c = tl.arange(0, BLOCK_C)
    mask_w = offs_w < windows

    k = tl.full((BLOCK_M, BLOCK_D_QK), float("-inf"), ACC)
    v = tl.full((BLOCK_M, BLOCK_D_V), float("-inf"), ACC)
    argmax_k = tl.zeros((BLOCK_M, BLOCK_D_QK), tl.uint8)
    argmax_v = tl.zeros((BLOCK_M, BLOCK_D_V), tl.uint8)
    if BLOCK_REST > 0:
        rest = tl.full((BLOCK_M, BLOCK_REST), float("-inf"), ACC)
        argmax_r = tl.zeros((BLOCK_M, BLOCK_REST), tl.uint8)
    if WHOLE:  # the weights are read once, not once a place of the windows
        mask_whole = (offs_c < C) | EVEN_C
        w_theta = load_weight(w_theta_ptr, 1, C, offs_c, mask_whole, 0, D_QK, BLOCK_D_QK)
        w_phi = load_weight(w_phi_ptr, 1, C, offs_c, mask_whole, 0, D_QK, BLOCK_D_QK)
        w_g = load_weight(w_g_ptr, 1, C, offs_c, mask_whole, 0, D_V, BLOCK_D_V)
        if BLOCK_REST > 0:
            w_rest = load_weight(w_g_ptr, 1, C, offs_c, mask_whole, BLOCK_D_V, D_V, BLOCK_REST)
    for j in range(4 if POOL else 1):
        offs_n = pixel_of(offs_w, j, W, W_windows, POOL)
        mask_n = mask_w
        if POOL and not EVEN_HW:
            mask_n &= (offs_w // W_windows * 2 + j // 2 < H) & (offs_w % W_windows * 2 + j % 2 < W)
        x_tile = x_ptr + b * stride_x_b + offs_n[:, None] * stride_x_n
        if WHOLE:
            x = load_chunk(x_tile, stride_x_c, offs_c, mask_whole, mask_n).to(dtype)
            moved = x + 0.0
            acc_q = tl.dot(moved, w_theta, input_precision=PRECISION, out_dtype=ACC)
            acc_k = tl.dot(x, w_phi, input_precision=PRECISION, out_dtype=ACC)
            acc_v = tl.dot(moved, w_g, input_precision=PRECISION, out_dtype=ACC)
            if BLOCK_REST > 0:
                acc_r = tl.dot(moved + 0.0, w_rest, input_precision=PRECISION, out_dtype=ACC)
        else:
            acc_q = tl.zeros((BLOCK_M, BLOCK_D_QK), ACC)
            acc_k = tl.zeros((BLOCK_M, BLOCK_D_QK), ACC)
            acc_v = tl.zeros((BLOCK_M, BLOCK_D_V), ACC)
            if BLOCK_REST > 0:
                acc_r = tl.zeros((BLOCK_M, BLOCK_REST), ACC)
            for start_c in tl.range(0, C, BLOCK_C):
                c = start_c + offs_c
                mask_c = (c < C) | EVEN_C
                x = load_chunk(x_tile, stride_x_c, c, mask_c, mask_n).to(dtype)
                moved = x + 0.0
                w = load_weight(w_theta_ptr, 1, C, c, mask_c, 0, D_QK, BLOCK_D_QK)
                acc_q = tl.dot(moved, w, acc_q, input_precision=PRECISION, out_dtype=ACC)
                w = load_weight(w_phi_ptr, 1, C, c, mask_c, 0, D_QK, BLOCK_D_QK)
                acc_k = tl.dot(x, w, acc_k, input_precision=PRECISION, out_dtype=ACC)
                w = load_weight(w_g_ptr, 1, C, c, mask_c, 0, D_V, BLOCK_D_V)
                acc_v = tl.dot(moved, w, acc_v, input_precision=PRECISION, out_dtype=ACC)
                if BLOCK_REST > 0:
                    w = load_weight(w_g_ptr, 1, C, c, mask_c, BLOCK_D_V, D_V, BLOCK_REST)
                    acc_r = tl.dot(moved + 0.0, w, acc_r, input_precision=PRECISION, out_dtype=ACC)
        if b_theta_ptr is not None:
            acc_q += load_bias(b_theta_ptr, 0, D_QK, BLOCK_D_QK)
        store_rows(q_ptr, D_QK, acc_q, b * N + offs_n, mask_n, 0, D_QK, BLOCK_D_QK)
        if POOL:
            if argmax_ptr is not None:
                argmax_k = place_of_larger(k, argmax_k, acc_k, j)
                argmax_v = place_of_larger(v, argmax_v, acc_v, j)
            k = tl.maximum(k, acc_k, propagate_nan=tl.PropagateNan.ALL)
            v = tl.maximum(v, acc_v, propagate_nan=tl.PropagateNan.ALL)
            if BLOCK_REST > 0:
                if argmax_ptr is not None:
                    argmax_r = place_of_larger(rest, argmax_r, acc_r, j)
                rest = tl.maximum(rest, acc_r, propagate_nan=tl.PropagateNan.ALL)
        else:
            k = acc_k
            v = acc_v
            if BLOCK_REST > 0:
                rest = acc_r

    offs_m, mask_m = offs_w, mask_w
    if POOL and not EVEN_HW:
        row, column = offs_w // W_windows, offs_w % W_windows
        offs_m, mask_m = row * (W // 2) + column, (row < H // 2) & (column < W // 2)
    rows = b * M + offs_m
    store_pooled(k, argmax_k, k_ptr, b_phi_ptr, argmax_ptr, D_QK, D_QK + D_V, rows, mask_m, 0, D_QK, BLOCK_D_QK)
    argmax_v_ptr = None if argmax_ptr is None else argmax_ptr + D_QK
    store_pooled(v, argmax_v, v_ptr, b_g_ptr, argmax_v_ptr, D_V, D_QK + D_V, rows, mask_m, 0, D_V, BLOCK_D_V)
    if BLOCK_REST > 0:
        store_pooled(
            rest, argmax_r, v_ptr, b_g_ptr, argmax_v_ptr, D_V, D_QK + D_V, rows, mask_m, BLOCK_D_V, D_V, BLOCK_REST
        )


@triton.jit
def place_of_larger(best, argmax, value, j):
    """Return `j` where `value` is larger than `best` or NaN, elsewhere `argmax`, the place of `best`."""
    return tl.where((value > best) | (value != value), j, argmax).to(tl.uint8)


@triton.jit
def store_pooled(
    tile, argmax, out_ptr, bias_ptr, argmax_ptr, stride_out, stride_argmax, rows, mask,
    FIRST: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Store `tile` + bias and, where there is an `argmax_ptr`, `argmax` as columns FIRST.. of D of `rows`."""
    if bias_ptr is not None:
        tile += load_bias(bias_ptr, FIRST, D, BLOCK)
    store_rows(out_ptr, stride_out, tile, rows, mask, FIRST, D, BLOCK)
    if argmax_ptr is not None:
        store_rows(argmax_ptr, stride_argmax, argmax, rows, mask, FIRST, D, BLOCK)


_DENSE = ("w_theta", "w_phi", "w_g", "b_theta", "b_phi", "b_g")


def projection_fwd(
    x: Tensor,
    w_theta: Tensor,
    w_phi: Tensor,
    w_g: Tensor,
    b_theta: Tensor | None = None,
    b_phi: Tensor | None = None,
    b_g: Tensor | None = None,
    *,
    pool: bool,
    save: bool = True,
    config: LaunchConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return q (B, N, D_QK), k (B, M, D_QK), v (B, M, D_V) and the argmax of the pool (B, M, D_QK + D_V).

    `x` (B, C, H, W) has any float dtype and is contiguous or channels_last. The weights `w_theta`, `w_phi` (D_QK, C),
    `w_g` (D_V, C) and the biases `b_theta`, `b_phi` (D_QK,), `b_g` (D_V,) are contiguous and share a dtype: that of
    the products, of q, k and v. N is H*W; M is N or, with `pool`, (H//2)*(W//2). The argmax is uint8 (0..3, row by row
    of the window), and None without `pool` or without `save`. Raises ValueError for what is not contiguous.
    """
    check_contiguous("projection_fwd", _DENSE, (w_theta, w_phi, w_g, b_theta, b_phi, b_g))
    B, C, H, W = x.shape
    D_QK, D_V, N = w_phi.shape[0], w_g.shape[0], H * W
    M = (H // 2) * (W // 2) if pool else N
    new = w_phi.new_empty
    q, k, v = new((B, N, D_QK)), new((B, M, D_QK)), new((B, M, D_V))
    argmax = None
    if pool and save:
        argmax = new((B, M, D_QK + D_V), dtype=torch.uint8)
    precision = precision_of(w_phi.dtype)

    def describe() -> Launch:
        chosen = config or lookup("projection_fwd", arch_of(x), precision, D_QK, D_V)
        # wide chunks are for weights used four times; of a contiguous x each element's address would take a register
        block_c = min(chosen.BLOCK_C, padded(C) if pool and is_channels_last(x) else 32)
        window, windows = (4, cdiv(H, 2) * cdiv(W, 2)) if pool else (1, N)
        grid, (width, rest) = grid_of(cdiv(windows, chosen.BLOCK_M), B), split(D_V)
        stride_x_b, stride_x_c, stride_x_n = strides_of(x)
        return Launch(
            grid,
            chosen,
            dict(
                stride_x_b=stride_x_b, stride_x_c=stride_x_c, stride_x_n=stride_x_n,
                N=N, M=M, C=C, H=H, W=W,
            ),
            dict(
                D_QK=D_QK, D_V=D_V, POOL=pool, EVEN_C=C % block_c == 0, EVEN_HW=H % 2 == W % 2 == 0,
                WHOLE=block_c >= C, FLAT=len(grid) == 1,
                BLOCK_M=chosen.BLOCK_M, BLOCK_C=block_c,
                BLOCK_D_QK=padded(D_QK), BLOCK_D_V=width, BLOCK_REST=rest,
                **arithmetic(precision, chosen),
            ),
            lambda: Needs(
                flops=2 * B * C * (N * D_QK + window * M * (D_QK + D_V)),
                bytes_read=size_of(x, w_theta, w_phi, w_g, b_theta, b_phi, b_g),
                bytes_written=size_of(q, k, v, argmax),
            ),
        )  # fmt: skip

    tensors = dict(
        x_ptr=x, w_theta_ptr=w_theta, w_phi_ptr=w_phi, w_g_ptr=w_g,
        b_theta_ptr=b_theta, b_phi_ptr=b_phi, b_g_ptr=b_g,
        q_ptr=q, k_ptr=k, v_ptr=v, argmax_ptr=argmax,
    )  # fmt: skip
    launch(
        "projection_fwd",
        _fwd_kernel,
        tensors,
        (x.shape, is_channels_last(x), D_QK, D_V, pool, precision, config),
        describe,
    )
    return q, k, v, argmax
