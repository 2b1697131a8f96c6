"""softmax(scale q kᵀ) v by tiles; the N x M map is never in memory.

Grid: see kernels/tiles.py; a program owns BLOCK_N queries of one image and goes through all keys. Scores, maxima, sums
and the output accumulate in float32. Exponentials are to base 2: log2(e) is part of the multiplication before them.
The log-sum-exp that backward needs is to base 2 too. Oracle: reference.attention.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import LOG2_E
from ..configs import LaunchConfig, lookup
from ..launch import Launch, Needs, accumulator_dtype, arch_of, launch, precision_of, size_of
from ..tiles import arithmetic, cdiv, grid_of, load_rows, locate, padded, split, store_lost, store_rows


@triton.jit
def exp2_of_whole(x):
    """Return 2**x of whole x <= 0 in float32, 0 from -127 on, without the special-function unit."""
    bits = (tl.maximum(x, -127.0) + 12583039.0).to(tl.int32, bitcast=True)  # 1.5 * 2**23 + 127: x + 127 in the low bits
    return (bits << 23).to(tl.float32, bitcast=True)


@triton.jit
def attend(
    q, k_ptr, v_ptr,  # (BLOCK_N, BLOCK_D_QK), pointers to the image's k (M, D_QK) and v (M, D_V)
    stride_k_m, stride_k_d, stride_v_m, stride_v_d,
    M, scale_log2,  # scale * log2(e), not negative
    D_QK: tl.constexpr, D_V: tl.constexpr, EVEN_M: tl.constexpr, SUM_BY_PRODUCT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D_QK: tl.constexpr,
    BLOCK_D_V: tl.constexpr, BLOCK_REST: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Return exp(scale q kᵀ - row_max) v, row_max (BLOCK_N,) to base 2, and the sums (BLOCK_N,) to divide by, all ACC.

    The first comes in two parts, (BLOCK_N, BLOCK_D_V) and (BLOCK_N, BLOCK_REST); without BLOCK_REST they are the same.

    With SUM_BY_PRODUCT the tensor cores add up each row of exp(...), rounded as for the product with v. The maximum is
    rounded down to a whole number before it is subtracted. Overflow is as impossible, and the factor from one tile to
    the next is a power of two, which needs no exponential. ACC is float32 then.
    """
    offs_m = tl.arange(0, BLOCK_M)
    offs_qk = tl.arange(0, BLOCK_D_QK)
    offs_v = tl.arange(0, BLOCK_D_V)
    k_ptrs = k_ptr + offs_qk[:, None] * stride_k_d + offs_m[None, :] * stride_k_m
    v_ptrs = v_ptr + offs_m[:, None] * stride_v_m + offs_v[None, :] * stride_v_d
    mask_qk = offs_qk < D_QK
    mask_v = offs_v < D_V
    row_max = tl.full((BLOCK_N,), float("-inf"), ACC)
    row_sum = tl.zeros((BLOCK_N,), ACC)
    acc = tl.zeros((BLOCK_N, BLOCK_D_V), ACC)
    rest = acc
    if SUM_BY_PRODUCT:
        sums = tl.zeros((BLOCK_N, 8), ACC)
    if BLOCK_REST > 0:
        offs_r = BLOCK_D_V + tl.arange(0, BLOCK_REST)
        r_ptrs = v_ptr + offs_m[:, None] * stride_v_m + offs_r[None, :] * stride_v_d
        mask_r = offs_r < D_V
        rest = tl.zeros((BLOCK_N, BLOCK_REST), ACC)
    for start_m in tl.range(0, M, BLOCK_M):
        mask_m = (start_m + offs_m < M) | EVEN_M
        k = tl.load(k_ptrs, mask=mask_qk[:, None] & mask_m[None, :], other=0.0)
        s = tl.dot(q, k, input_precision=PRECISION, out_dtype=ACC)
        if not EVEN_M:
            s = tl.where(mask_m[None, :], s, float("-inf"))
        if SUM_BY_PRODUCT:
            whole = tl.floor(tl.max(s, 1) * scale_log2)
            new_max = tl.maximum(row_max, whole)
            correction = exp2_of_whole(row_max - new_max)
        else:
            new_max = tl.maximum(row_max, tl.max(s, 1) * scale_log2)
            correction = tl.exp2(row_max - new_max)
        p = tl.exp2(s * scale_log2 - new_max[:, None])
        row_max = new_max
        v = tl.load(v_ptrs, mask=mask_m[:, None] & mask_v[None, :], other=0.0)
        if BLOCK_REST > 0:
            v_rest = tl.load(r_ptrs, mask=mask_m[:, None] & mask_r[None, :], other=0.0)
        rounded = p.to(v.dtype)
        if SUM_BY_PRODUCT:
            ones = tl.full((BLOCK_M, 8), 1.0, v.dtype)
            sums = tl.dot(rounded, ones, sums * correction[:, None], input_precision=PRECISION, out_dtype=ACC)
        else:
            row_sum = row_sum * correction + tl.sum(p, 1)
        acc = tl.dot(rounded, v, acc * correction[:, None], input_precision=PRECISION, out_dtype=ACC)
        if BLOCK_REST > 0:
            rest = tl.dot(rounded, v_rest, rest * correction[:, None], input_precision=PRECISION, out_dtype=ACC)
            r_ptrs += BLOCK_M * stride_v_m
        k_ptrs += BLOCK_M * stride_k_m
        v_ptrs += BLOCK_M * stride_v_m
    if SUM_BY_PRODUCT:
        row_sum = tl.max(sums, 1)  # all columns are alike
    return acc, rest, row_max, row_sum


@triton.jit
def _fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr,  # (B, N, D_QK), (B, M, D_QK), (B, M, D_V), (B, N, D_V)
    lse_ptr, lost_ptr,  # (B, N), (B, N, D_V); None where backward needs none
    stride_q_b, stride_q_n, stride_q_d,
    stride_k_b, stride_k_m, stride_k_d,
    stride_v_b, stride_v_m, stride_v_d,
    N, M, scale_log2,
    D_QK: tl.constexpr, D_V: tl.constexpr, PACKED: tl.constexpr, EVEN_M: tl.constexpr, NEGATE: tl.constexpr,
    FLAT: tl.constexpr, SUM_BY_PRODUCT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D_QK: tl.constexpr,
    BLOCK_D_V: tl.constexpr, BLOCK_REST: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    b, offs_n = locate(N, BLOCK_N, FLAT)
    mask_n = offs_n < N
    if PACKED:  # known at compile time, so that rows of 8 or 24 are loaded as aligned as they are
        stride_q_n = D_QK
        stride_k_m = D_QK
        stride_v_m = D_V
    q = load_rows(q_ptr + b * stride_q_b, stride_q_n, stride_q_d, offs_n, mask_n, 0, D_QK, BLOCK_D_QK)
    if NEGATE:
        q = -q
    out, rest, row_max, row_sum = attend(
        q, k_ptr + b * stride_k_b, v_ptr + b * stride_v_b, stride_k_m, stride_k_d, stride_v_m, stride_v_d,
        M, scale_log2, D_QK, D_V, EVEN_M, SUM_BY_PRODUCT,
        BLOCK_N, BLOCK_M, BLOCK_D_QK, BLOCK_D_V, BLOCK_REST, PRECISION, ACC,
    )  # fmt: skip
    rows = b * N + offs_n
    inverse = (1.0 / row_sum)[:, None]
    out *= inverse
    store_rows(out_ptr, D_V, out, rows, mask_n, 0, D_V, BLOCK_D_V)
    if lost_ptr is not None:
        store_lost(lost_ptr, D_V, out, rows, mask_n, 0, D_V, BLOCK_D_V)
    if BLOCK_REST > 0:
        rest *= inverse
        store_rows(out_ptr, D_V, rest, rows, mask_n, BLOCK_D_V, D_V, BLOCK_REST)
        if lost_ptr is not None:
            store_lost(lost_ptr, D_V, rest, rows, mask_n, BLOCK_D_V, D_V, BLOCK_REST)
    if lse_ptr is not None:
        tl.store(lse_ptr + rows, row_max + tl.log2(row_sum), mask=mask_n)


def is_packed(*tensors: Tensor) -> bool:
    """Return whether in each of `tensors` (B, rows, D) one row follows the other without a gap."""
    return all(t.stride(2) == 1 and t.stride(1) == t.shape[2] for t in tensors)


def attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, scale: float = 1.0, *, save: bool = True, config: LaunchConfig | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return softmax(scale q kᵀ) v, (B, N, D_V) contiguous, and what backward needs with `save`: log-sum-exp and rest.

    `q` (B, N, D_QK), `k` (B, M, D_QK), `v` (B, M, D_V) share a dtype and may have any strides. The log-sum-exp is
    (B, N), to base 2, float32 (float64 for float64). The rest is what the output lost by rounding to 16 bits, in its
    shape and dtype. Both are None without `save`, the rest also for wider dtypes. With M = 0 the output is zero, as a
    product with nothing is.
    """
    (B, N, D_QK), (_, M, D_V) = q.shape, v.shape
    out = torch.empty((B, N, D_V), device=q.device, dtype=q.dtype)
    precision = precision_of(q.dtype)
    lse = torch.empty((B, N), device=q.device, dtype=accumulator_dtype(q.dtype)) if save else None
    lost = torch.empty_like(out) if save and q.dtype != accumulator_dtype(q.dtype) else None
    if M == 0:
        lost = None if lost is None else lost.zero_()
        return out.zero_(), lse if lse is None else lse.fill_(-math.inf), lost

    def describe() -> Launch:
        chosen = config or lookup("attention_fwd", arch_of(q), precision, D_QK, D_V, N)
        grid, (width, rest) = grid_of(cdiv(N, chosen.BLOCK_N), B), split(D_V)
        return Launch(
            grid,
            chosen,
            dict(
                stride_q_b=q.stride(0), stride_q_n=q.stride(1), stride_q_d=q.stride(2),
                stride_k_b=k.stride(0), stride_k_m=k.stride(1), stride_k_d=k.stride(2),
                stride_v_b=v.stride(0), stride_v_m=v.stride(1), stride_v_d=v.stride(2),
                N=N, M=M, scale_log2=abs(scale) * LOG2_E or 2.0**-100,  # -inf * 0 is NaN
            ),
            dict(
                D_QK=D_QK, D_V=D_V, PACKED=is_packed(q, k, v), EVEN_M=M % chosen.BLOCK_M == 0, NEGATE=scale < 0,
                FLAT=len(grid) == 1, SUM_BY_PRODUCT=chosen.sum_by_product,
                BLOCK_N=chosen.BLOCK_N, BLOCK_M=chosen.BLOCK_M,
                BLOCK_D_QK=padded(D_QK), BLOCK_D_V=width, BLOCK_REST=rest,
                **arithmetic(precision, chosen),
            ),
            lambda: Needs(
                flops=2 * B * N * M * (D_QK + D_V),
                exps=B * N * M,
                bytes_read=size_of(q, k, v),
                bytes_written=size_of(out, lse, lost),
            ),
        )  # fmt: skip

    tensors = dict(
        q_ptr=q, k_ptr=k, v_ptr=v, out_ptr=out, lse_ptr=lse, lost_ptr=lost,
    )  # fmt: skip
    launch(
        "attention_fwd",
        _fwd_kernel,
        tensors,
        (B, N, M, D_QK, D_V, q.stride(), k.stride(), v.stride(), scale, precision, config),
        describe,
    )
    return out, lse, lost
