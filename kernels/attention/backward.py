"""Gradients of softmax(scale q kᵀ) v: the map is computed again by tiles, never stored.

With P = exp2(scale_log2 q kᵀ - lse), d_o the gradient of P v, delta = rowsum(d_o * o), dS = P * (d_o vᵀ - delta):
dv = Pᵀ d_o, dk = scale dSᵀ q, dq = scale dS k. Three kernels, deterministic, O(N) memory:
- that of preprocess.py: delta.
- `_bwd_dkv_kernel`: one program owns BLOCK_M keys and goes through all queries.
- `_bwd_dq_kernel`: one program owns BLOCK_N queries and goes through all keys.
Products accumulate in float32; P and dS are rounded to the inputs' dtype before them. Why not one pass: docs/log.md,
"Attention kernels". Oracle: autograd through reference.attention.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import LOG2_E
from ..checks import check_contiguous
from ..configs import LaunchConfig, lookup
from ..launch import Launch, Needs, arch_of, launch, precision_of, size_of
from ..tiles import arithmetic, cdiv, grid_of, load_rows, locate, padded, split, store_rows
from .forward import is_packed
from .preprocess import attention_bwd_preprocess


@triton.jit
def gradients_of_keys(
    b, offs_m, q_ptr, k_ptr, v_ptr, d_o_ptr, lse_ptr, delta_ptr,
    stride_q_b, stride_q_n, stride_q_d,
    stride_k_b, stride_k_m, stride_k_d,
    stride_v_b, stride_v_m, stride_v_d,
    stride_d_o_b, stride_d_o_n, stride_d_o_d,
    N, M, scale_log2,
    D_QK: tl.constexpr, D_V: tl.constexpr, PACKED: tl.constexpr, EVEN_N: tl.constexpr, EVEN_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D_QK: tl.constexpr,
    BLOCK_D_V: tl.constexpr, BLOCK_REST: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Return dk / scale (BLOCK_M, BLOCK_D_QK) and dv of the keys `offs_m` of image `b`, ACC.

    dv comes in two parts, (BLOCK_M, BLOCK_D_V) and (BLOCK_M, BLOCK_REST); without BLOCK_REST they are the same.
    """
    offs_n = tl.arange(0, BLOCK_N)
    offs_qk = tl.arange(0, BLOCK_D_QK)
    offs_v = tl.arange(0, BLOCK_D_V)
    mask_m = offs_m < M
    mask_qk = offs_qk < D_QK
    mask_v = offs_v < D_V
    if PACKED:  # known at compile time, so that rows of 8 or 24 are loaded as aligned as they are
        stride_q_n = D_QK
        stride_k_m = D_QK
        stride_v_m = D_V
        stride_d_o_n = D_V
    k = load_rows(k_ptr + b * stride_k_b, stride_k_m, stride_k_d, offs_m, mask_m, 0, D_QK, BLOCK_D_QK)
    v = load_rows(v_ptr + b * stride_v_b, stride_v_m, stride_v_d, offs_m, mask_m, 0, D_V, BLOCK_D_V)
    q_ptrs = q_ptr + b * stride_q_b + offs_n[:, None] * stride_q_n + offs_qk[None, :] * stride_q_d
    d_o_ptrs = d_o_ptr + b * stride_d_o_b + offs_n[:, None] * stride_d_o_n + offs_v[None, :] * stride_d_o_d
    lse_ptrs = lse_ptr + b * N + offs_n
    delta_ptrs = delta_ptr + b * N + offs_n
    dk = tl.zeros((BLOCK_M, BLOCK_D_QK), ACC)
    dv = tl.zeros((BLOCK_M, BLOCK_D_V), ACC)
    dv_rest = dv
    if BLOCK_REST > 0:
        offs_r = BLOCK_D_V + tl.arange(0, BLOCK_REST)
        mask_r = offs_r < D_V
        v_rest = load_rows(v_ptr + b * stride_v_b, stride_v_m, stride_v_d, offs_m, mask_m, BLOCK_D_V, D_V, BLOCK_REST)
        r_ptrs = d_o_ptr + b * stride_d_o_b + offs_n[:, None] * stride_d_o_n + offs_r[None, :] * stride_d_o_d
        dv_rest = tl.zeros((BLOCK_M, BLOCK_REST), ACC)
    for start_n in tl.range(0, N, BLOCK_N):
        mask_n = (start_n + offs_n < N) | EVEN_N
        q = tl.load(q_ptrs, mask=mask_n[:, None] & mask_qk[None, :], other=0.0)
        lse = tl.load(lse_ptrs, mask=mask_n, other=float("inf"))
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION, out_dtype=ACC)
        p = tl.exp2(s * scale_log2 - lse[None, :])  # (BLOCK_M, BLOCK_N), zero for queries past the end
        if not EVEN_M:  # exp2(0 - lse) may be infinite, and infinity times a zero k is NaN
            p = tl.where(mask_m[:, None], p, 0.0)
        d_o = tl.load(d_o_ptrs, mask=mask_n[:, None] & mask_v[None, :], other=0.0)
        rounded = p.to(d_o.dtype)
        dv = tl.dot(rounded, d_o, dv, input_precision=PRECISION, out_dtype=ACC)
        dp = tl.dot(v, tl.trans(d_o), input_precision=PRECISION, out_dtype=ACC)
        if BLOCK_REST > 0:
            d_rest = tl.load(r_ptrs, mask=mask_n[:, None] & mask_r[None, :], other=0.0)
            dv_rest = tl.dot(rounded, d_rest, dv_rest, input_precision=PRECISION, out_dtype=ACC)
            dp = tl.dot(v_rest, tl.trans(d_rest), dp, input_precision=PRECISION, out_dtype=ACC)
            r_ptrs += BLOCK_N * stride_d_o_n
        delta = tl.load(delta_ptrs, mask=mask_n, other=0.0)
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION, out_dtype=ACC)
        q_ptrs += BLOCK_N * stride_q_n
        d_o_ptrs += BLOCK_N * stride_d_o_n
        lse_ptrs += BLOCK_N
        delta_ptrs += BLOCK_N
    return dk, dv, dv_rest


@triton.jit
def _bwd_dkv_kernel(
    q_ptr, k_ptr, v_ptr, d_o_ptr, lse_ptr, delta_ptr,  # (B, N or M, D) each, (B, N), (B, N)
    dk_ptr, dv_ptr,  # (B, M, D) each
    stride_q_b, stride_q_n, stride_q_d,
    stride_k_b, stride_k_m, stride_k_d,
    stride_v_b, stride_v_m, stride_v_d,
    stride_d_o_b, stride_d_o_n, stride_d_o_d,
    stride_dk_b, stride_dk_m, stride_dv_b, stride_dv_m,
    N, M, scale, scale_log2,
    D_QK: tl.constexpr, D_V: tl.constexpr, PACKED: tl.constexpr,
    EVEN_N: tl.constexpr, EVEN_M: tl.constexpr, FLAT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D_QK: tl.constexpr,
    BLOCK_D_V: tl.constexpr, BLOCK_REST: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    b, offs_m = locate(M, BLOCK_M, FLAT)
    mask_m = offs_m < M
    dk, dv, dv_rest = gradients_of_keys(
        b, offs_m, q_ptr, k_ptr, v_ptr, d_o_ptr, lse_ptr, delta_ptr,
        stride_q_b, stride_q_n, stride_q_d, stride_k_b, stride_k_m, stride_k_d,
        stride_v_b, stride_v_m, stride_v_d, stride_d_o_b, stride_d_o_n, stride_d_o_d,
        N, M, scale_log2, D_QK, D_V, PACKED, EVEN_N, EVEN_M,
        BLOCK_N, BLOCK_M, BLOCK_D_QK, BLOCK_D_V, BLOCK_REST, PRECISION, ACC,
    )  # fmt: skip
    dk_ptr += b * stride_dk_b
    dv_ptr += b * stride_dv_b
    store_rows(dk_ptr, stride_dk_m, dk * scale, offs_m, mask_m, 0, D_QK, BLOCK_D_QK)
    store_rows(dv_ptr, stride_dv_m, dv, offs_m, mask_m, 0, D_V, BLOCK_D_V)
    if BLOCK_REST > 0:
        store_rows(dv_ptr, stride_dv_m, dv_rest, offs_m, mask_m, BLOCK_D_V, D_V, BLOCK_REST)


@triton.jit
def _bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, d_o_ptr, lse_ptr, delta_ptr, dq_ptr,  # (B, N or M, D) each, (B, N), (B, N), (B, N, D_QK)
    stride_q_b, stride_q_n, stride_q_d,
    stride_k_b, stride_k_m, stride_k_d,
    stride_v_b, stride_v_m, stride_v_d,
    stride_d_o_b, stride_d_o_n, stride_d_o_d,
    stride_dq_b, stride_dq_n,
    N, M, scale, scale_log2,
    D_QK: tl.constexpr, D_V: tl.constexpr, PACKED: tl.constexpr, EVEN_M: tl.constexpr, FLAT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D_QK: tl.constexpr,
    BLOCK_D_V: tl.constexpr, BLOCK_REST: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    b, offs_n = locate(N, BLOCK_N, FLAT)
    offs_m = tl.arange(0, BLOCK_M)
    offs_qk = tl.arange(0, BLOCK_D_QK)
    offs_v = tl.arange(0, BLOCK_D_V)
    mask_n = offs_n < N
    mask_qk = offs_qk < D_QK
    mask_v = offs_v < D_V
    if PACKED:
        stride_q_n = D_QK
        stride_k_m = D_QK
        stride_v_m = D_V
        stride_d_o_n = D_V
    rows = b * N + offs_n
    q = load_rows(q_ptr + b * stride_q_b, stride_q_n, stride_q_d, offs_n, mask_n, 0, D_QK, BLOCK_D_QK)
    d_o_ptr += b * stride_d_o_b
    d_o = load_rows(d_o_ptr, stride_d_o_n, stride_d_o_d, offs_n, mask_n, 0, D_V, BLOCK_D_V)
    lse = tl.load(lse_ptr + rows, mask=mask_n, other=float("inf"))
    delta = tl.load(delta_ptr + rows, mask=mask_n, other=0.0)
    k_ptrs = k_ptr + b * stride_k_b + offs_m[:, None] * stride_k_m + offs_qk[None, :] * stride_k_d
    v_ptrs = v_ptr + b * stride_v_b + offs_m[:, None] * stride_v_m + offs_v[None, :] * stride_v_d
    if BLOCK_REST > 0:
        offs_r = BLOCK_D_V + tl.arange(0, BLOCK_REST)
        mask_r = offs_r < D_V
        d_rest = load_rows(d_o_ptr, stride_d_o_n, stride_d_o_d, offs_n, mask_n, BLOCK_D_V, D_V, BLOCK_REST)
        r_ptrs = v_ptr + b * stride_v_b + offs_m[:, None] * stride_v_m + offs_r[None, :] * stride_v_d
    dq = tl.zeros((BLOCK_N, BLOCK_D_QK), ACC)
    for start_m in tl.range(0, M, BLOCK_M):
        mask_m = (start_m + offs_m < M) | EVEN_M
        k = tl.load(k_ptrs, mask=mask_m[:, None] & mask_qk[None, :], other=0.0)
        v = tl.load(v_ptrs, mask=mask_m[:, None] & mask_v[None, :], other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=ACC)
        p = tl.exp2(s * scale_log2 - lse[:, None])
        if not EVEN_M:  # exp2(0 - lse) may be infinite, and infinity times a zero k is NaN
            p = tl.where(mask_m[None, :], p, 0.0)
        dp = tl.dot(d_o, tl.trans(v), input_precision=PRECISION, out_dtype=ACC)
        if BLOCK_REST > 0:
            v = tl.load(r_ptrs, mask=mask_m[:, None] & mask_r[None, :], other=0.0)
            dp = tl.dot(d_rest, tl.trans(v), dp, input_precision=PRECISION, out_dtype=ACC)
            r_ptrs += BLOCK_M * stride_v_m
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION, out_dtype=ACC)
        k_ptrs += BLOCK_M * stride_k_m
        v_ptrs += BLOCK_M * stride_v_m
    store_rows(dq_ptr + b * stride_dq_b, stride_dq_n, dq * scale, offs_n, mask_n, 0, D_QK, BLOCK_D_QK)


def describe_dkv(
    q: Tensor, k: Tensor, v: Tensor, d_o: Tensor, lse: Tensor, delta: Tensor, dk: Tensor, dv: Tensor,
    scale: float, config: LaunchConfig | None,
) -> Launch:  # fmt: skip
    """Return the launch of a kernel that computes dk and dv and stores them with the strides of `dk` and `dv`."""
    (B, N, D_QK), (_, M, D_V) = q.shape, v.shape
    precision = precision_of(q.dtype)
    config = config or lookup("attention_bwd_dkv", arch_of(q), precision, D_QK, D_V, M)
    grid, (width, rest) = grid_of(cdiv(M, config.BLOCK_M), B), split(D_V)
    return Launch(
        grid,
        config,
        dict(
            stride_q_b=q.stride(0), stride_q_n=q.stride(1), stride_q_d=q.stride(2),
            stride_k_b=k.stride(0), stride_k_m=k.stride(1), stride_k_d=k.stride(2),
            stride_v_b=v.stride(0), stride_v_m=v.stride(1), stride_v_d=v.stride(2),
            stride_d_o_b=d_o.stride(0), stride_d_o_n=d_o.stride(1), stride_d_o_d=d_o.stride(2),
            stride_dk_b=dk.stride(0), stride_dk_m=dk.stride(1), stride_dv_b=dv.stride(0), stride_dv_m=dv.stride(1),
            N=N, M=M, scale=float(scale), scale_log2=scale * LOG2_E,
        ),
        dict(
            D_QK=D_QK, D_V=D_V, PACKED=is_packed(q, k, v, d_o),
            EVEN_N=N % config.BLOCK_N == 0, EVEN_M=M % config.BLOCK_M == 0, FLAT=len(grid) == 1,
            BLOCK_N=config.BLOCK_N, BLOCK_M=config.BLOCK_M,
            BLOCK_D_QK=padded(D_QK), BLOCK_D_V=width, BLOCK_REST=rest,
            **arithmetic(precision, config),
        ),
        lambda: Needs(
            flops=4 * B * N * M * (D_QK + D_V),
            exps=B * N * M,
            bytes_read=size_of(q, k, v, d_o, lse, delta),
            bytes_written=size_of(k, v),
        ),
    )  # fmt: skip


def attention_bwd_dkv(
    q: Tensor, k: Tensor, v: Tensor, d_o: Tensor, lse: Tensor, delta: Tensor, dk: Tensor, dv: Tensor,
    scale: float = 1.0, *, config: LaunchConfig | None = None,
) -> None:  # fmt: skip
    """Fill dk (B, M, D_QK) and dv (B, M, D_V), whose last axes have stride 1."""
    launch(
        "attention_bwd_dkv",
        _bwd_dkv_kernel,
        dict(q_ptr=q, k_ptr=k, v_ptr=v, d_o_ptr=d_o, lse_ptr=lse, delta_ptr=delta, dk_ptr=dk, dv_ptr=dv),
        dkv_key(q, k, v, d_o, dk, dv, scale, config),
        lambda: describe_dkv(q, k, v, d_o, lse, delta, dk, dv, scale, config),
    )


def dkv_key(
    q: Tensor, k: Tensor, v: Tensor, d_o: Tensor, dk: Tensor, dv: Tensor, scale: float, config: LaunchConfig | None
) -> tuple[object, ...]:
    """Return what `describe_dkv` depends on."""
    strides = (tensor.stride() for tensor in (q, k, v, d_o, dk, dv))
    return (q.shape, v.shape, *strides, scale, precision_of(q.dtype), config)


def attention_bwd_dq(
    q: Tensor, k: Tensor, v: Tensor, d_o: Tensor, lse: Tensor, delta: Tensor, dq: Tensor,
    scale: float = 1.0, *, config: LaunchConfig | None = None,
) -> None:  # fmt: skip
    """Fill dq (B, N, D_QK), whose last axis has stride 1."""
    (B, N, D_QK), (_, M, D_V) = q.shape, v.shape
    precision = precision_of(q.dtype)

    def describe() -> Launch:
        chosen = config or lookup("attention_bwd_dq", arch_of(q), precision, D_QK, D_V, N)
        grid, (width, rest) = grid_of(cdiv(N, chosen.BLOCK_N), B), split(D_V)
        return Launch(
            grid,
            chosen,
            dict(
                stride_q_b=q.stride(0), stride_q_n=q.stride(1), stride_q_d=q.stride(2),
                stride_k_b=k.stride(0), stride_k_m=k.stride(1), stride_k_d=k.stride(2),
                stride_v_b=v.stride(0), stride_v_m=v.stride(1), stride_v_d=v.stride(2),
                stride_d_o_b=d_o.stride(0), stride_d_o_n=d_o.stride(1), stride_d_o_d=d_o.stride(2),
                stride_dq_b=dq.stride(0), stride_dq_n=dq.stride(1),
                N=N, M=M, scale=float(scale), scale_log2=scale * LOG2_E,
            ),
            dict(
                D_QK=D_QK, D_V=D_V, PACKED=is_packed(q, k, v, d_o), EVEN_M=M % chosen.BLOCK_M == 0,
                FLAT=len(grid) == 1, BLOCK_N=chosen.BLOCK_N, BLOCK_M=chosen.BLOCK_M,
                BLOCK_D_QK=padded(D_QK), BLOCK_D_V=width, BLOCK_REST=rest,
                **arithmetic(precision, chosen),
            ),
            lambda: Needs(
                flops=2 * B * N * M * (2 * D_QK + D_V),
                exps=B * N * M,
                bytes_read=size_of(q, k, v, d_o, lse, delta),
                bytes_written=size_of(q),
            ),
        )  # fmt: skip

    tensors = dict(
        q_ptr=q, k_ptr=k, v_ptr=v, d_o_ptr=d_o, lse_ptr=lse, delta_ptr=delta, dq_ptr=dq,
    )  # fmt: skip
    launch(
        "attention_bwd_dq",
        _bwd_dq_kernel,
        tensors,
        (B, N, M, D_QK, D_V, *(t.stride() for t in (q, k, v, d_o, dq)), scale, precision, config),
        describe,
    )


def attention_bwd(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lost: Tensor | None = None,
    scale: float = 1.0,
    *,
    preprocess_config: LaunchConfig | None = None,
    dkv_config: LaunchConfig | None = None,
    dq_config: LaunchConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq (B, N, D_QK), dk (B, M, D_QK), dv (B, M, D_V), contiguous, in the dtype of q.

    `d_out` (B, N, D_V) of that dtype and any strides, as q, k and v; `out`, `lse` and `lost` from `attention_fwd`.
    """
    check_contiguous("attention_bwd", ("out", "lse", "lost"), (out, lse, lost))
    dq, dk, dv = (torch.empty(t.shape, device=t.device, dtype=t.dtype) for t in (q, k, v))
    if k.shape[1] == 0 or q.shape[1] == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    delta = attention_bwd_preprocess(d_out, out, lost, config=preprocess_config)
    attention_bwd_dkv(q, k, v, d_out, lse, delta, dk, dv, scale, config=dkv_config)
    attention_bwd_dq(q, k, v, d_out, lse, delta, dq, scale, config=dq_config)
    return dq, dk, dv
