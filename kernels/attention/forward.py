"""softmax(scale q kᵀ) v by tiles, bare and as the middle of the whole attention block; the map is never in memory.

`attention_fwd` takes q, k, v. `block_fwd` takes them from projection_fwd with x: its epilogue computes
y = x + W_o (gamma * o) + gamma * b_o over C in chunks, so o need not go to memory, and y is written once.
Grid: kernels/tiles.py; a program owns BLOCK_N queries of one image and goes through all keys.
Scores, maxima, sums and the output accumulate in float32, what is added to x is rounded to its dtype first;
exponentials are to base 2, log2(e) folded into the one multiply-add in front of them; the log-sum-exp kept for backward
is in units of log2. Oracle: reference.attention.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import Launch, Needs, arch_of, launch, precision_of, size_of
from ..projection.forward import is_channels_last, strides_of
from ..tiles import (
    arithmetic,
    cdiv,
    grid_of,
    load_rows,
    load_weight_t,
    locate,
    padded,
    split,
    store_rows,
)
from .configs import AttentionConfig, lookup_forward

LOG2_E = math.log2(math.e)


@triton.jit
def exp2_of_whole(x):
    """2**x for whole x <= 0 in float32, 0 from -127 on: put together, without the special-function unit."""
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
    """Return exp(scale q kᵀ - row_max) v in two parts (BLOCK_N, BLOCK_D_V), (BLOCK_N, BLOCK_REST), without BLOCK_REST
    the second is the first, row_max (BLOCK_N,), in units of log2, and the sums (BLOCK_N,) to divide by, all ACC.

    With SUM_BY_PRODUCT the tensor cores add up the weights as they are rounded for the product with v, and what is
    subtracted from the scores is their maximum rounded to a whole number: as good against overflow, and the factor
    from one tile to the next is an exact power of two, which takes no exponential. ACC is float32 then.
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
            whole = tl.max(s, 1) * scale_log2 + 12582912.0 - 12582912.0  # 1.5 * 2**23: no room for a fraction
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
        weights = p.to(v.dtype)
        if SUM_BY_PRODUCT:
            ones = tl.full((BLOCK_M, 8), 1.0, v.dtype)
            sums = tl.dot(weights, ones, sums * correction[:, None], input_precision=PRECISION, out_dtype=ACC)
        else:
            row_sum = row_sum * correction + tl.sum(p, 1)
        acc = tl.dot(weights, v, acc * correction[:, None], input_precision=PRECISION, out_dtype=ACC)
        if BLOCK_REST > 0:
            rest = tl.dot(weights, v_rest, rest * correction[:, None], input_precision=PRECISION, out_dtype=ACC)
            r_ptrs += BLOCK_M * stride_v_m
        k_ptrs += BLOCK_M * stride_k_m
        v_ptrs += BLOCK_M * stride_v_m
    if SUM_BY_PRODUCT:
        row_sum = tl.max(sums, 1)  # all columns are alike
    return acc, rest, row_max, row_sum


@triton.jit
def _fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr,  # (B, N, D_QK), (B, M, D_QK), (B, M, D_V), (B, N, D_V), (B, N) or None
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
    store_rows(out_ptr, D_V, out * inverse, rows, mask_n, 0, D_V, BLOCK_D_V)
    if BLOCK_REST > 0:
        store_rows(out_ptr, D_V, rest * inverse, rows, mask_n, BLOCK_D_V, D_V, BLOCK_REST)
    if lse_ptr is not None:
        tl.store(lse_ptr + rows, row_max + tl.log2(row_sum), mask=mask_n)


@triton.jit
def _block_fwd_kernel(
    x_ptr, q_ptr, k_ptr, v_ptr,  # (B, C, N), (B, N, D_QK), (B, M, D_QK), (B, M, D_V)
    w_o_ptr, b_o_ptr, gamma_ptr, y_ptr,  # (C, D_V) or None, (C,) or None, one element, (B, C, N)
    o_ptr, lse_ptr,  # (B, N, D_V), (B, N); None where backward will not be
    stride_x_b, stride_x_c, stride_x_n,  # and of y
    N, M, C,
    D_QK: tl.constexpr, D_V: tl.constexpr, EVEN_N: tl.constexpr, EVEN_M: tl.constexpr, EVEN_C: tl.constexpr,
    LOG2_E: tl.constexpr, FLAT: tl.constexpr, SUM_BY_PRODUCT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_D_QK: tl.constexpr, BLOCK_D_V: tl.constexpr, BLOCK_REST: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    dtype = k_ptr.dtype.element_ty
    b, offs_n = locate(N, BLOCK_N, FLAT)
    offs_c = tl.arange(0, BLOCK_C)
    mask_n = (offs_n < N) | EVEN_N
    rows = b * N + offs_n
    x_tile = x_ptr + b * stride_x_b + offs_n[:, None] * stride_x_n
    y_tile = y_ptr + b * stride_x_b + offs_n[:, None] * stride_x_n

    q = load_rows(q_ptr + b * N * D_QK, D_QK, 1, offs_n, mask_n, 0, D_QK, BLOCK_D_QK)
    offs_qk = tl.arange(0, BLOCK_D_QK)
    unit = (offs_qk[:, None] == offs_qk[None, :]).to(dtype)
    q = tl.dot(q, unit, input_precision=PRECISION, out_dtype=ACC).to(dtype)
    out, rest, row_max, row_sum = attend(
        q, k_ptr + b * M * D_QK, v_ptr + b * M * D_V, D_QK, 1, D_V, 1,
        M, LOG2_E, D_QK, D_V, EVEN_M, SUM_BY_PRODUCT,
        BLOCK_N, BLOCK_M, BLOCK_D_QK, BLOCK_D_V, BLOCK_REST, PRECISION, ACC,
    )  # fmt: skip
    inverse = 1.0 / row_sum
    if o_ptr is not None:
        store_rows(o_ptr, D_V, out * inverse[:, None], rows, mask_n, 0, D_V, BLOCK_D_V)
        if BLOCK_REST > 0:
            store_rows(o_ptr, D_V, rest * inverse[:, None], rows, mask_n, BLOCK_D_V, D_V, BLOCK_REST)
        tl.store(lse_ptr + rows, row_max + tl.log2(row_sum), mask=mask_n)

    gamma = tl.load(gamma_ptr).to(ACC)
    out *= (inverse * gamma)[:, None]
    rest *= (inverse * gamma)[:, None]
    if w_o_ptr is not None:
        o = out.to(dtype)
        o_rest = rest.to(dtype)
        for start_c in tl.range(0, C, BLOCK_C):
            c = start_c + offs_c
            mask_c = (c < C) | EVEN_C
            w = load_weight_t(w_o_ptr, D_V, c, mask_c, 0, D_V, BLOCK_D_V)
            if BLOCK_REST > 0:
                w_rest = load_weight_t(w_o_ptr, D_V, c, mask_c, BLOCK_D_V, D_V, BLOCK_REST)
            y = tl.dot(o, w, input_precision=PRECISION, out_dtype=ACC)
            if BLOCK_REST > 0:
                y = tl.dot(o_rest, w_rest, y, input_precision=PRECISION, out_dtype=ACC)
            if b_o_ptr is not None:
                y += tl.load(b_o_ptr + c, mask=mask_c, other=0.0)[None, :] * gamma
            add_residual(x_tile, y_tile, stride_x_c, y.to(x_ptr.dtype.element_ty), c, mask_c, mask_n)
    else:
        add_columns(x_tile, y_tile, stride_x_c, out, mask_n, 0, D_V, BLOCK_D_V)
        if BLOCK_REST > 0:
            add_columns(x_tile, y_tile, stride_x_c, rest, mask_n, BLOCK_D_V, D_V, BLOCK_REST)


@triton.jit
def add_residual(x_tile, y_tile, stride_c, value, c, mask_c, mask_n):
    """Store x + `value` (BLOCK_N, BLOCK_C) at channels `c` of the positions at `y_tile` (BLOCK_N, 1)."""
    offs = c[None, None, :] * stride_c
    mask = mask_n[:, None, None] & mask_c[None, None, :]
    y = tl.load(x_tile[:, None, :] + offs, mask=mask, other=0.0) + value[:, None, :]
    tl.store(y_tile[:, None, :] + offs, y, mask=mask)


@triton.jit
def add_columns(x_tile, y_tile, stride_c, value, mask_n, FIRST: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    """The same at the BLOCK channels from FIRST on, of D."""
    c = FIRST + tl.arange(0, BLOCK)
    add_residual(x_tile, y_tile, stride_c, value.to(x_tile.dtype.element_ty), c, c < D, mask_n)


def is_packed(*tensors: Tensor) -> bool:
    """Whether in each of `tensors` (B, rows, D) a row follows the other without a gap."""
    return all(t.stride(2) == 1 and t.stride(1) == t.shape[2] for t in tensors)


def attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, scale: float = 1.0, *, save_lse: bool = True, config: AttentionConfig | None = None
) -> tuple[Tensor, Tensor | None]:
    """Return softmax(scale q kᵀ) v, (B, N, D_V) contiguous, and its log2-sum-exp (B, N), float32.

    `q` (B, N, D_QK), `k` (B, M, D_QK), `v` (B, M, D_V) share a dtype and may have any strides. With M = 0 the output
    is zero, as a product with nothing is. The log-sum-exp is None without `save_lse`.
    """
    (B, N, D_QK), (_, M, D_V) = q.shape, v.shape
    out = torch.empty((B, N, D_V), device=q.device, dtype=q.dtype)
    precision = precision_of(q.dtype)
    acc_dtype = torch.float64 if precision == "fp64" else torch.float32
    lse = torch.empty((B, N), device=q.device, dtype=acc_dtype) if save_lse else None
    if M == 0:
        return out.zero_(), lse if lse is None else lse.fill_(-math.inf)

    def describe() -> Launch:
        chosen = config or lookup_forward(arch_of(q), precision, D_QK, D_V, N)
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
                **arithmetic(precision),
            ),
            lambda: Needs(
                flops=2 * B * N * M * (D_QK + D_V),
                exps=B * N * M,
                bytes_read=size_of(q, k, v),
                bytes_written=size_of(out, lse),
                loops=(cdiv(M, chosen.BLOCK_M),),
            ),
        )  # fmt: skip

    tensors = dict(
        q_ptr=q, k_ptr=k, v_ptr=v, out_ptr=out, lse_ptr=lse,
    )  # fmt: skip
    launch(
        "attention_fwd",
        _fwd_kernel,
        tensors,
        (B, N, M, D_QK, D_V, q.stride(), k.stride(), v.stride(), scale, precision, config),
        describe,
    )
    return out, lse


def block_fwd(
    x: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w_o: Tensor | None,
    gamma: Tensor,
    b_o: Tensor | None = None,
    *,
    save: bool = True,
    config: AttentionConfig | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return y = x + gamma * (W_o softmax(q kᵀ) v + b_o), and with `save` o (B, N, D_V) and lse (B, N).

    `x` (B, C, H, W) of any float dtype, contiguous or channels_last; y has its shape, strides and dtype. Products
    are in the dtype of `q` (B, N, D_QK), `k` (B, M, D_QK), `v` (B, M, D_V) and `w_o` (C, D_V), all contiguous; with
    `w_o` None, D_V is C. `gamma` holds one element of any float dtype and is read by the kernel.
    """
    (B, C), (_, N, D_QK), (_, M, D_V) = x.shape[:2], q.shape, v.shape
    y = torch.empty_like(x)
    precision = precision_of(k.dtype)
    o = lse = None
    if save:
        o = torch.empty((B, N, D_V), device=x.device, dtype=k.dtype)
        lse = torch.empty((B, N), device=x.device, dtype=torch.float64 if precision == "fp64" else torch.float32)

    def describe() -> Launch:
        chosen = config or lookup_forward(arch_of(x), precision, D_QK, D_V, N)
        chunks = cdiv(C, chosen.BLOCK_C)
        grid, (width, rest) = grid_of(cdiv(N, chosen.BLOCK_N), B), split(D_V)
        stride_b, stride_c, stride_n = strides_of(x)
        return Launch(
            grid,
            chosen,
            dict(
                stride_x_b=stride_b, stride_x_c=stride_c, stride_x_n=stride_n,
                N=N, M=M, C=C,
            ),
            dict(
                D_QK=D_QK, D_V=D_V, EVEN_N=N % chosen.BLOCK_N == 0, EVEN_M=M % chosen.BLOCK_M == 0,
                EVEN_C=C % chosen.BLOCK_C == 0, LOG2_E=LOG2_E, FLAT=len(grid) == 1,
                SUM_BY_PRODUCT=chosen.sum_by_product,
                BLOCK_N=chosen.BLOCK_N, BLOCK_M=chosen.BLOCK_M, BLOCK_C=chosen.BLOCK_C,
                BLOCK_D_QK=padded(D_QK), BLOCK_D_V=width, BLOCK_REST=rest,
                **arithmetic(precision),
            ),
            lambda: Needs(
                flops=2 * B * N * (M * (D_QK + D_V) + (0 if w_o is None else C * D_V)),
                exps=B * N * M,
                bytes_read=size_of(x, q, k, v, w_o, b_o, gamma),
                bytes_written=size_of(y, o, lse),
                loops=(cdiv(M, chosen.BLOCK_M), *([] if w_o is None else [chunks])),
            ),
        )  # fmt: skip

    tensors = dict(
        x_ptr=x, q_ptr=q, k_ptr=k, v_ptr=v,
        w_o_ptr=w_o, b_o_ptr=b_o, gamma_ptr=gamma, y_ptr=y, o_ptr=o, lse_ptr=lse,
    )  # fmt: skip
    launch(
        "attention_block_fwd",
        _block_fwd_kernel,
        tensors,
        (x.shape, is_channels_last(x), M, D_QK, D_V, precision, config),
        describe,
    )
    return y, o, lse
