"""softmax(scale q kᵀ) v by tiles, bare and as the middle of the whole attention block; the map is never in memory.

`attention_fwd` takes q, k, v. `block_fwd` takes x with k and v (from projection_fwd): its prologue computes
q = W_theta x + b_theta, its epilogue y = x + gamma * (W_o o + b_o), both over C in chunks, so x is read once for q and
once (from L2) for the residual, y is written once, and q and o go to memory only where backward will need them.
Grid of both: cdiv(N, BLOCK_N) * B programs; one owns BLOCK_N queries of one image and goes through all keys.
Scores, maxima, sums and the output accumulate in float32; exponentials are to base 2, log2(e) folded into the one
multiply-add in front of them; the log-sum-exp kept for backward is in units of log2. Oracle: reference.attention.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import Needs, arch_of, launch, precision_of, size_of
from ..projection.configs import padded
from ..projection.forward import strides_of
from .configs import AttentionConfig, lookup_forward

LOG2_E = math.log2(math.e)


@triton.jit
def attend(
    q, k_ptr, v_ptr,  # (BLOCK_N, BLOCK_D_QK), pointers to the image's k (M, D_QK) and v (M, D_V)
    stride_k_m, stride_k_d, stride_v_m, stride_v_d,
    M, scale_log2,  # scale * log2(e), not negative
    D_QK: tl.constexpr, D_V: tl.constexpr, EVEN_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D_QK: tl.constexpr, BLOCK_D_V: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Return softmax(scale q kᵀ) v (BLOCK_N, BLOCK_D_V) and the rows' log2-sum-exp (BLOCK_N,), both ACC."""
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
    for start_m in tl.range(0, M, BLOCK_M):
        mask_m = (start_m + offs_m < M) | EVEN_M
        k = tl.load(k_ptrs, mask=mask_qk[:, None] & mask_m[None, :], other=0.0)
        s = tl.dot(q, k, input_precision=PRECISION, out_dtype=ACC)
        if not EVEN_M:
            s = tl.where(mask_m[None, :], s, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(s, 1) * scale_log2)
        p = tl.exp2(s * scale_log2 - new_max[:, None])
        correction = tl.exp2(row_max - new_max)
        row_sum = row_sum * correction + tl.sum(p, 1)
        row_max = new_max
        v = tl.load(v_ptrs, mask=mask_m[:, None] & mask_v[None, :], other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * correction[:, None], input_precision=PRECISION, out_dtype=ACC)
        k_ptrs += BLOCK_M * stride_k_m
        v_ptrs += BLOCK_M * stride_v_m
    return acc * (1.0 / row_sum)[:, None], row_max + tl.log2(row_sum)


@triton.jit
def _fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr,  # (B, N, D_QK), (B, M, D_QK), (B, M, D_V), (B, N, D_V), (B, N) or None
    stride_q_b, stride_q_n, stride_q_d,
    stride_k_b, stride_k_m, stride_k_d,
    stride_v_b, stride_v_m, stride_v_d,
    N, M, scale_log2,
    D_QK: tl.constexpr, D_V: tl.constexpr, PACKED: tl.constexpr, EVEN_M: tl.constexpr, NEGATE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D_QK: tl.constexpr, BLOCK_D_V: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    num_n = tl.cdiv(N, BLOCK_N)
    b = (tl.program_id(0) // num_n).to(tl.int64)
    offs_n = tl.program_id(0) % num_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_qk = tl.arange(0, BLOCK_D_QK)
    offs_v = tl.arange(0, BLOCK_D_V)
    mask_n = offs_n < N
    if PACKED:  # known at compile time, so that rows of 8 or 24 are loaded as aligned as they are
        stride_q_n = D_QK
        stride_k_m = D_QK
        stride_v_m = D_V
    q_ptrs = q_ptr + b * stride_q_b + offs_n[:, None].to(tl.int64) * stride_q_n + offs_qk[None, :] * stride_q_d
    q = tl.load(q_ptrs, mask=mask_n[:, None] & (offs_qk < D_QK)[None, :], other=0.0)
    if NEGATE:
        q = -q
    out, lse = attend(
        q, k_ptr + b * stride_k_b, v_ptr + b * stride_v_b, stride_k_m, stride_k_d, stride_v_m, stride_v_d,
        M, scale_log2, D_QK, D_V, EVEN_M, BLOCK_N, BLOCK_M, BLOCK_D_QK, BLOCK_D_V, PRECISION, ACC,
    )  # fmt: skip
    rows = b * N + offs_n
    out_ptrs = out_ptr + rows[:, None] * D_V + offs_v[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=mask_n[:, None] & (offs_v < D_V)[None, :])
    if lse_ptr is not None:
        tl.store(lse_ptr + rows, lse, mask=mask_n)


@triton.jit
def _block_fwd_kernel(
    x_ptr, w_theta_ptr, b_theta_ptr, k_ptr, v_ptr,  # (B, C, N), (D_QK, C), (D_QK,) or None, (B, M, D_QK), (B, M, D_V)
    w_o_ptr, b_o_ptr, gamma_ptr, y_ptr,  # (C, D_V) or None, (C,) or None, one element, (B, C, N)
    q_ptr, o_ptr, lse_ptr,  # (B, N, D_QK), (B, N, D_V), (B, N); None where backward will not be
    stride_x_b, stride_x_c, stride_x_n,  # and of y
    N, M, C,
    D_QK: tl.constexpr, D_V: tl.constexpr, EVEN_M: tl.constexpr, EVEN_C: tl.constexpr, LOG2_E: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_D_QK: tl.constexpr, BLOCK_D_V: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    dtype = k_ptr.dtype.element_ty
    num_n = tl.cdiv(N, BLOCK_N)
    b = (tl.program_id(0) // num_n).to(tl.int64)
    offs_n = tl.program_id(0) % num_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_c = tl.arange(0, BLOCK_C)
    offs_qk = tl.arange(0, BLOCK_D_QK)
    offs_v = tl.arange(0, BLOCK_D_V)
    mask_n = offs_n < N
    mask_qk = offs_qk < D_QK
    mask_v = offs_v < D_V
    rows = b * N + offs_n
    x_tile = x_ptr + b * stride_x_b + offs_n[:, None] * stride_x_n

    acc_q = tl.zeros((BLOCK_N, BLOCK_D_QK), ACC)
    # few trips: filling and draining a pipeline would cost more instructions than it hides, here and in the epilogue
    for start_c in tl.range(0, C, BLOCK_C, num_stages=1):
        c = start_c + offs_c
        mask_c = (c < C) | EVEN_C
        x = tl.load(x_tile + c[None, :] * stride_x_c, mask=mask_n[:, None] & mask_c[None, :], other=0.0)
        w = tl.load(w_theta_ptr + c[:, None] + offs_qk[None, :] * C, mask=mask_c[:, None] & mask_qk[None, :], other=0.0)
        acc_q = tl.dot(x.to(dtype), w, acc_q, input_precision=PRECISION, out_dtype=ACC)
    if b_theta_ptr is not None:
        acc_q += tl.load(b_theta_ptr + offs_qk, mask=mask_qk, other=0.0)[None, :]
    q = acc_q.to(dtype)
    if q_ptr is not None:
        tl.store(q_ptr + rows[:, None] * D_QK + offs_qk[None, :], q, mask=mask_n[:, None] & mask_qk[None, :])

    out, lse = attend(
        q, k_ptr + b * M * D_QK, v_ptr + b * M * D_V, D_QK, 1, D_V, 1,
        M, LOG2_E, D_QK, D_V, EVEN_M, BLOCK_N, BLOCK_M, BLOCK_D_QK, BLOCK_D_V, PRECISION, ACC,
    )  # fmt: skip
    o = out.to(dtype)
    if o_ptr is not None:
        tl.store(o_ptr + rows[:, None] * D_V + offs_v[None, :], o, mask=mask_n[:, None] & mask_v[None, :])
        tl.store(lse_ptr + rows, lse, mask=mask_n)

    gamma = tl.load(gamma_ptr).to(ACC)
    y_tile = y_ptr + b * stride_x_b + offs_n[:, None] * stride_x_n
    if w_o_ptr is not None:
        for start_c in tl.range(0, C, BLOCK_C, num_stages=1):
            c = start_c + offs_c
            mask_c = (c < C) | EVEN_C
            mask_nc = mask_n[:, None] & mask_c[None, :]
            w = tl.load(w_o_ptr + c[None, :] * D_V + offs_v[:, None], mask=mask_c[None, :] & mask_v[:, None], other=0.0)
            y = tl.dot(o, w, input_precision=PRECISION, out_dtype=ACC)
            if b_o_ptr is not None:
                y += tl.load(b_o_ptr + c, mask=mask_c, other=0.0)[None, :]
            x = tl.load(x_tile + c[None, :] * stride_x_c, mask=mask_nc, other=0.0)
            y = x.to(ACC) + gamma * y
            tl.store(y_tile + c[None, :] * stride_x_c, y.to(y_ptr.dtype.element_ty), mask=mask_nc)
    else:
        mask_nv = mask_n[:, None] & mask_v[None, :]
        x = tl.load(x_tile + offs_v[None, :] * stride_x_c, mask=mask_nv, other=0.0)
        y = x.to(ACC) + gamma * out
        tl.store(y_tile + offs_v[None, :] * stride_x_c, y.to(y_ptr.dtype.element_ty), mask=mask_nv)


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
    config = config or lookup_forward(arch_of(q), precision, D_QK, D_V, N)
    launch(
        "attention_fwd",
        _fwd_kernel,
        triton.cdiv(N, config.BLOCK_N) * B,
        config,
        dict(
            q_ptr=q, k_ptr=k, v_ptr=v, out_ptr=out, lse_ptr=lse,
            stride_q_b=q.stride(0), stride_q_n=q.stride(1), stride_q_d=q.stride(2),
            stride_k_b=k.stride(0), stride_k_m=k.stride(1), stride_k_d=k.stride(2),
            stride_v_b=v.stride(0), stride_v_m=v.stride(1), stride_v_d=v.stride(2),
            N=N, M=M, scale_log2=abs(scale) * LOG2_E or 2.0**-100,  # -inf * 0 is NaN
        ),
        dict(
            D_QK=D_QK, D_V=D_V, PACKED=is_packed(q, k, v), EVEN_M=M % config.BLOCK_M == 0, NEGATE=scale < 0,
            BLOCK_N=config.BLOCK_N, BLOCK_M=config.BLOCK_M, BLOCK_D_QK=padded(D_QK), BLOCK_D_V=padded(D_V),
            PRECISION="tf32" if precision == "tf32" else "ieee", ACC=tl.float64 if precision == "fp64" else tl.float32,
        ),
        lambda: Needs(
            flops=2 * B * N * M * (D_QK + D_V),
            exps=B * N * M,
            bytes_read=size_of(q, k, v),
            bytes_written=size_of(out, lse),
            loops=(triton.cdiv(M, config.BLOCK_M),),
        ),
    )  # fmt: skip
    return out, lse


def block_fwd(
    x: Tensor,
    w_theta: Tensor,
    k: Tensor,
    v: Tensor,
    w_o: Tensor | None,
    gamma: Tensor,
    b_theta: Tensor | None = None,
    b_o: Tensor | None = None,
    *,
    save: bool = True,
    config: AttentionConfig | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Return y = x + gamma * (W_o softmax(q kᵀ) v + b_o), and with `save` q (B, N, D_QK), o (B, N, D_V), lse (B, N).

    `x` (B, C, H, W) of any float dtype, contiguous or channels_last; y has its shape, strides and dtype. Products
    are in the dtype of `k` (B, M, D_QK), `v` (B, M, D_V), `w_theta` (D_QK, C) and `w_o` (C, D_V), all contiguous;
    with `w_o` None, D_V is C. `gamma` holds one element of any float dtype and is read by the kernel.
    """
    B, C, N = x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
    (_, M, D_QK), D_V = k.shape, v.shape[2]
    y = torch.empty_like(x)
    stride_b, stride_c, stride_n = strides_of(x)
    precision = precision_of(k.dtype)
    q = o = lse = None
    if save:
        q = torch.empty((B, N, D_QK), device=x.device, dtype=k.dtype)
        o = torch.empty((B, N, D_V), device=x.device, dtype=k.dtype)
        lse = torch.empty((B, N), device=x.device, dtype=torch.float64 if precision == "fp64" else torch.float32)
    config = config or lookup_forward(arch_of(x), precision, D_QK, D_V, N)
    chunks = triton.cdiv(C, config.BLOCK_C)
    launch(
        "attention_block_fwd",
        _block_fwd_kernel,
        triton.cdiv(N, config.BLOCK_N) * B,
        config,
        dict(
            x_ptr=x, w_theta_ptr=w_theta, b_theta_ptr=b_theta, k_ptr=k, v_ptr=v,
            w_o_ptr=w_o, b_o_ptr=b_o, gamma_ptr=gamma, y_ptr=y, q_ptr=q, o_ptr=o, lse_ptr=lse,
            stride_x_b=stride_b, stride_x_c=stride_c, stride_x_n=stride_n,
            N=N, M=M, C=C,
        ),
        dict(
            D_QK=D_QK, D_V=D_V, EVEN_M=M % config.BLOCK_M == 0, EVEN_C=C % config.BLOCK_C == 0, LOG2_E=LOG2_E,
            BLOCK_N=config.BLOCK_N, BLOCK_M=config.BLOCK_M, BLOCK_C=config.BLOCK_C,
            BLOCK_D_QK=padded(D_QK), BLOCK_D_V=padded(D_V),
            PRECISION="tf32" if precision == "tf32" else "ieee", ACC=tl.float64 if precision == "fp64" else tl.float32,
        ),
        lambda: Needs(
            flops=2 * B * N * (M * (D_QK + D_V) + C * D_QK + (0 if w_o is None else C * D_V)),
            exps=B * N * M,
            bytes_read=size_of(x, w_theta, b_theta, k, v, w_o, b_o, gamma),
            bytes_written=size_of(y, q, o, lse),
            loops=(chunks, triton.cdiv(M, config.BLOCK_M), *([] if w_o is None else [chunks])),
        ),
    )  # fmt: skip
    return y, q, o, lse
