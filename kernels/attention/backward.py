"""Gradients of softmax(scale q kᵀ) v and of the whole attention block; the map is computed anew by tiles, never stored.

With P = exp2(scale_log2 q kᵀ - lse), d_o the gradient of P v, delta = rowsum(d_o * o), dS = P * (d_o vᵀ - delta):
dv = Pᵀ d_o, dk = scale dSᵀ q, dq = scale dS k. Three kernels, deterministic, O(N) memory:
- that of delta.py: delta, for the block also d_o and d_gamma.
- `_bwd_dkv_kernel`: one program owns BLOCK_M keys and goes through all queries. dk and dv
  are stored straight at their positions before the max-pool, side by side with dq (projection/backward.py).
- `_bwd_dq_kernel`: one program owns BLOCK_N queries and goes through all keys.
One pass instead of two was tried: `_bwd_dkv_kernel` storing each block of keys' share of dq costs 15 to 20 % more
instructions (sm_90, (16, 64), 128 x 64: 730 issue clocks a tile against 620, and 504 for the tile in `_bwd_dq_kernel`),
but the shares, 4 * D_QK bytes for every 128 scores, are written and read: 395 clocks a tile of an H200's bandwidth at
D_QK 16, 790 at 32. It wins at most a fifth, and nothing from C = 256 on; and its memory is O(N*M), half the map's at
D_QK 32. Atomics would be O(N) but not deterministic.
Products accumulate in float32, P and dS are rounded to the inputs' dtype before them. Oracle: autograd through
reference.attention.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import Launch, Needs, arch_of, launch, precision_of, size_of
from ..projection.backward import projection_bwd_input, projection_bwd_weight, store_unpooled
from ..projection.forward import is_channels_last, strides_of
from ..tiles import arithmetic, cdiv, grid_of, load_rows, locate, padded, split, store_rows
from .configs import AttentionConfig, DeltaConfig, lookup_dkv, lookup_dq
from .delta import delta_bwd
from .forward import LOG2_E, is_packed


@triton.jit
def _bwd_dkv_kernel(
    q_ptr, k_ptr, v_ptr, d_o_ptr, lse_ptr, delta_ptr,  # (B, N or M, D) each, (B, N), (B, N)
    argmax_ptr, dk_ptr, dv_ptr,  # (B, M, D_QK + D_V) or None; with POOL (B, N, D), else (B, M, D)
    stride_q_b, stride_q_n, stride_q_d,
    stride_k_b, stride_k_m, stride_k_d,
    stride_v_b, stride_v_m, stride_v_d,
    stride_d_o_b, stride_d_o_n, stride_d_o_d,
    stride_dk_b, stride_dk_m, stride_dv_b, stride_dv_m,
    N, M, W, scale, scale_log2,
    D_QK: tl.constexpr, D_V: tl.constexpr, POOL: tl.constexpr, PACKED: tl.constexpr,
    EVEN_N: tl.constexpr, EVEN_M: tl.constexpr, FLAT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D_QK: tl.constexpr,
    BLOCK_D_V: tl.constexpr, BLOCK_REST: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    b, offs_m = locate(M, BLOCK_M, FLAT)
    offs_n = tl.arange(0, BLOCK_N)
    offs_qk = tl.arange(0, BLOCK_D_QK)
    offs_v = tl.arange(0, BLOCK_D_V)
    mask_m = offs_m < M
    mask_qk = offs_qk < D_QK
    mask_v = offs_v < D_V
    if PACKED:
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
        weights = p.to(d_o.dtype)
        dv = tl.dot(weights, d_o, dv, input_precision=PRECISION, out_dtype=ACC)
        dp = tl.dot(v, tl.trans(d_o), input_precision=PRECISION, out_dtype=ACC)
        if BLOCK_REST > 0:
            d_rest = tl.load(r_ptrs, mask=mask_n[:, None] & mask_r[None, :], other=0.0)
            dv_rest = tl.dot(weights, d_rest, dv_rest, input_precision=PRECISION, out_dtype=ACC)
            dp = tl.dot(v_rest, tl.trans(d_rest), dp, input_precision=PRECISION, out_dtype=ACC)
            r_ptrs += BLOCK_N * stride_d_o_n
        delta = tl.load(delta_ptrs, mask=mask_n, other=0.0)
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION, out_dtype=ACC)
        q_ptrs += BLOCK_N * stride_q_n
        d_o_ptrs += BLOCK_N * stride_d_o_n
        lse_ptrs += BLOCK_N
        delta_ptrs += BLOCK_N
    argmax_k = argmax_ptr + b * M * (D_QK + D_V) if POOL else argmax_ptr
    argmax_v = argmax_k + D_QK if POOL else argmax_ptr
    dk_ptr += b * stride_dk_b
    dv_ptr += b * stride_dv_b
    store_unpooled(dk * scale, argmax_k, dk_ptr, D_QK + D_V, stride_dk_m, offs_m, mask_m, W, 0, D_QK, BLOCK_D_QK, POOL)
    store_unpooled(dv, argmax_v, dv_ptr, D_QK + D_V, stride_dv_m, offs_m, mask_m, W, 0, D_V, BLOCK_D_V, POOL)
    if BLOCK_REST > 0:
        store_unpooled(
            dv_rest, argmax_v, dv_ptr, D_QK + D_V, stride_dv_m, offs_m, mask_m, W, BLOCK_D_V, D_V, BLOCK_REST, POOL
        )


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


def _dkv(
    q: Tensor, k: Tensor, v: Tensor, d_o: Tensor, lse: Tensor, delta: Tensor,
    dk: Tensor, dv: Tensor, argmax: Tensor | None, W: int, scale: float, config: AttentionConfig | None,
) -> None:  # fmt: skip
    """Fill dk and dv: (B, M, D), or with `argmax` (B, N, D), unpooled; their last axes have stride 1."""
    (B, N, D_QK), (_, M, D_V) = q.shape, v.shape
    precision = precision_of(q.dtype)

    def describe() -> Launch:
        chosen = config or lookup_dkv(arch_of(q), precision, D_QK, D_V, M)
        grid, (width, rest) = grid_of(cdiv(M, chosen.BLOCK_M), B), split(D_V)
        return Launch(
            grid,
            chosen,
            dict(
                stride_q_b=q.stride(0), stride_q_n=q.stride(1), stride_q_d=q.stride(2),
                stride_k_b=k.stride(0), stride_k_m=k.stride(1), stride_k_d=k.stride(2),
                stride_v_b=v.stride(0), stride_v_m=v.stride(1), stride_v_d=v.stride(2),
                stride_d_o_b=d_o.stride(0), stride_d_o_n=d_o.stride(1), stride_d_o_d=d_o.stride(2),
                stride_dk_b=dk.stride(0), stride_dk_m=dk.stride(1), stride_dv_b=dv.stride(0), stride_dv_m=dv.stride(1),
                N=N, M=M, W=W, scale=float(scale), scale_log2=scale * LOG2_E,
            ),
            dict(
                D_QK=D_QK, D_V=D_V, POOL=argmax is not None, PACKED=is_packed(q, k, v, d_o),
                EVEN_N=N % chosen.BLOCK_N == 0, EVEN_M=M % chosen.BLOCK_M == 0, FLAT=len(grid) == 1,
                BLOCK_N=chosen.BLOCK_N, BLOCK_M=chosen.BLOCK_M,
                BLOCK_D_QK=padded(D_QK), BLOCK_D_V=width, BLOCK_REST=rest,
                **arithmetic(precision),
            ),
            lambda: Needs(
                flops=4 * B * N * M * (D_QK + D_V),
                exps=B * N * M,
                bytes_read=size_of(q, k, v, d_o, lse, delta, argmax),
                bytes_written=(1 if argmax is None else 4) * size_of(k, v),
                loops=(cdiv(N, chosen.BLOCK_N),),
            ),
        )  # fmt: skip

    tensors = dict(
        q_ptr=q, k_ptr=k, v_ptr=v, d_o_ptr=d_o, lse_ptr=lse, delta_ptr=delta,
        argmax_ptr=argmax, dk_ptr=dk, dv_ptr=dv,
    )  # fmt: skip
    launch(
        "attention_bwd_dkv",
        _bwd_dkv_kernel,
        tensors,
        (B, N, M, D_QK, D_V, *(t.stride() for t in (q, k, v, d_o, dk, dv)), W, scale, precision, config),
        describe,
    )


def _dq(
    q: Tensor, k: Tensor, v: Tensor, d_o: Tensor, lse: Tensor, delta: Tensor,
    dq: Tensor, scale: float, config: AttentionConfig | None,
) -> None:  # fmt: skip
    """Fill dq (B, N, D_QK), whose last axis has stride 1."""
    (B, N, D_QK), (_, M, D_V) = q.shape, v.shape
    precision = precision_of(q.dtype)

    def describe() -> Launch:
        chosen = config or lookup_dq(arch_of(q), precision, D_QK, D_V, N)
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
                **arithmetic(precision),
            ),
            lambda: Needs(
                flops=2 * B * N * M * (2 * D_QK + D_V),
                exps=B * N * M,
                bytes_read=size_of(q, k, v, d_o, lse, delta),
                bytes_written=size_of(q),
                loops=(cdiv(M, chosen.BLOCK_M),),
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
    scale: float = 1.0,
    *,
    delta_config: DeltaConfig | None = None,
    dkv_config: AttentionConfig | None = None,
    dq_config: AttentionConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq (B, N, D_QK), dk (B, M, D_QK), dv (B, M, D_V), contiguous, in the dtype of q.

    `d_out` (B, N, D_V) of that dtype and any strides, as q, k and v; `out` and `lse` from `attention_fwd`.
    """
    dq, dk, dv = (torch.empty(t.shape, device=t.device, dtype=t.dtype) for t in (q, k, v))
    if k.shape[1] == 0 or q.shape[1] == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    _, delta, _ = delta_bwd(
        d_out, (d_out.stride(0), d_out.stride(2), d_out.stride(1)), None, None, out, None, delta_config
    )
    _dkv(q, k, v, d_out, lse, delta, dk, dv, None, 0, scale, dkv_config)
    _dq(q, k, v, d_out, lse, delta, dq, scale, dq_config)
    return dq, dk, dv


def block_bwd(
    d_y: Tensor,
    x: Tensor,
    w_qkv: Tensor,
    w_o: Tensor | None,
    b_o: Tensor | None,
    gamma: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    argmax: Tensor | None,
    *,
    need_input: bool = True,
    need_weights: bool = True,
    need_biases: bool = True,
    delta_config: DeltaConfig | None = None,
    dkv_config: AttentionConfig | None = None,
    dq_config: AttentionConfig | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor]:
    """Return d_x, d_w_qkv, d_b_qkv, d_w_o, d_b_o and d_gamma of the block.

    `x` (B, C, H, W), contiguous or channels_last, and `d_y`, of any strides, share shape and dtype; `w_qkv`
    (2 * D_QK + D_V, C) is theta, phi and g one below the other, `w_o` (C, D_V) or None; q, k, v, o, lse from
    `block_fwd`, `argmax` from `projection_fwd` (None without pooling). d_x is like x, the weights' and biases'
    gradients are in the products' dtype, d_gamma is a scalar in that of lse. d_x is None without `need_input`, d_w_qkv
    and d_w_o without `need_weights`, d_b_qkv and d_b_o without `need_biases`; d_w_o and d_b_o where w_o is.
    """
    B, _, H, W = x.shape
    (_, N, D_QK), D_V = q.shape, v.shape[2]
    d_y = d_y.contiguous(memory_format=torch.channels_last if is_channels_last(x) else torch.contiguous_format)
    d_o, delta, d_gamma = delta_bwd(d_y, strides_of(x), w_o, b_o, o, gamma, delta_config)
    assert d_o is not None and d_gamma is not None  # as there is a gamma
    has_gaps = argmax is not None and (H % 2 == 1 or W % 2 == 1)  # rows and columns in no window
    allocate = torch.zeros if has_gaps else torch.empty
    G = allocate((B, N, 2 * D_QK + D_V), device=q.device, dtype=q.dtype)
    dq, dk, dv = G.split((D_QK, D_QK, D_V), dim=2)
    _dkv(q, k, v, d_o, lse, delta, dk, dv, argmax, W, 1.0, dkv_config)
    _dq(q, k, v, d_o, lse, delta, dq, 1.0, dq_config)

    d_x = d_w_qkv = d_b_qkv = d_w_o = d_b_o = None
    if need_input:
        d_x = projection_bwd_input(G, w_qkv, d_y, is_channels_last(x))
    if need_weights:
        d_w_qkv = projection_bwd_weight(G, x, is_channels_last(x))
        if w_o is not None:
            d_w_o = (projection_bwd_weight(o, d_y, is_channels_last(x)) * gamma.to(o.dtype)).T.contiguous()
    if need_biases:
        d_b_qkv = G.sum((0, 1), dtype=lse.dtype).to(G.dtype)
        if w_o is not None:
            d_b_o = (d_y.sum((0, 2, 3), dtype=lse.dtype) * gamma).to(G.dtype)
    return d_x, d_w_qkv, d_b_qkv, d_w_o, d_b_o, d_gamma
