"""The gradients of <d_o, tangent of softmax(scale q kᵀ) v>: attention's second backward, the map never in memory.

They are the second gradients of attention, and the tangents of its first: reference.attention_second says why. With
P = exp2(scale_log2 q kᵀ - lse), and T, X = d_o vᵀ, Y = d_o t_vᵀ less their row's number (mean, delta, eta):

    dS = P X,  R = P (T X + Y),  d_q = scale (dS t_k + R k),  d_k = scale (dSᵀ t_q + Rᵀ q),  d_v = (P T)ᵀ d_o.

Three kernels, deterministic, O(N) memory: that of tangent.py; one whose program owns BLOCK_M keys and goes through all
queries; one whose program owns BLOCK_N queries and goes through all keys. Products accumulate in float32; P T, dS and
R are rounded to the inputs' dtype before them. Oracle: reference.attention_second.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import LOG2_E
from ..configs import LaunchConfig, lookup
from ..launch import Launch, Needs, arch_of, launch, precision_of, size_of
from ..tiles import arithmetic, cdiv, grid_of, load_rows, locate, padded, store_rows
from .preprocess import attention_bwd_preprocess
from .tangent import attention_tangent


@triton.jit
def _second_dkv_kernel(
    q_ptr, k_ptr, v_ptr, t_q_ptr, t_k_ptr, t_v_ptr, d_o_ptr,  # (B, N or M, D) each, packed
    lse_ptr, mean_ptr, delta_ptr, eta_ptr, dk_ptr, dv_ptr,  # (B, N) four times, (B, M, D) each
    N, M, scale, scale_log2,
    D_QK: tl.constexpr, D_V: tl.constexpr, EVEN_N: tl.constexpr, EVEN_M: tl.constexpr, FLAT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D_QK: tl.constexpr, BLOCK_D_V: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    b, offs_m = locate(M, BLOCK_M, FLAT)
    mask_m = offs_m < M
    keys = b * M + offs_m
    k = load_rows(k_ptr, D_QK, 1, keys, mask_m, 0, D_QK, BLOCK_D_QK)
    t_k = load_rows(t_k_ptr, D_QK, 1, keys, mask_m, 0, D_QK, BLOCK_D_QK)
    v = load_rows(v_ptr, D_V, 1, keys, mask_m, 0, D_V, BLOCK_D_V)
    t_v = load_rows(t_v_ptr, D_V, 1, keys, mask_m, 0, D_V, BLOCK_D_V)
    dk = tl.zeros((BLOCK_M, BLOCK_D_QK), ACC)
    dv = tl.zeros((BLOCK_M, BLOCK_D_V), ACC)
    for start_n in tl.range(0, N, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        mask_n = (offs_n < N) | EVEN_N
        rows = b * N + offs_n
        q = load_rows(q_ptr, D_QK, 1, rows, mask_n, 0, D_QK, BLOCK_D_QK)
        t_q = load_rows(t_q_ptr, D_QK, 1, rows, mask_n, 0, D_QK, BLOCK_D_QK)
        d_o = load_rows(d_o_ptr, D_V, 1, rows, mask_n, 0, D_V, BLOCK_D_V)
        lse = tl.load(lse_ptr + rows, mask=mask_n, other=float("inf"))
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION, out_dtype=ACC)
        p = tl.exp2(s * scale_log2 - lse[None, :])  # (BLOCK_M, BLOCK_N), zero for queries past the end
        if not EVEN_M:  # exp2(0 - lse) may be infinite, and infinity times a zero is NaN
            p = tl.where(mask_m[:, None], p, 0.0)
        t = tl.dot(k, tl.trans(t_q), input_precision=PRECISION, out_dtype=ACC)
        t = tl.dot(t_k, tl.trans(q), t, input_precision=PRECISION, out_dtype=ACC)
        t = t * scale - tl.load(mean_ptr + rows, mask=mask_n, other=0.0)[None, :]
        dv = tl.dot((p * t).to(d_o.dtype), d_o, dv, input_precision=PRECISION, out_dtype=ACC)
        x = tl.dot(v, tl.trans(d_o), input_precision=PRECISION, out_dtype=ACC)
        x -= tl.load(delta_ptr + rows, mask=mask_n, other=0.0)[None, :]
        dk = tl.dot((p * x).to(q.dtype), t_q, dk, input_precision=PRECISION, out_dtype=ACC)
        y = tl.dot(t_v, tl.trans(d_o), input_precision=PRECISION, out_dtype=ACC)
        y -= tl.load(eta_ptr + rows, mask=mask_n, other=0.0)[None, :]
        dk = tl.dot((p * (t * x + y)).to(q.dtype), q, dk, input_precision=PRECISION, out_dtype=ACC)
    store_rows(dk_ptr, D_QK, dk * scale, keys, mask_m, 0, D_QK, BLOCK_D_QK)
    store_rows(dv_ptr, D_V, dv, keys, mask_m, 0, D_V, BLOCK_D_V)


@triton.jit
def _second_dq_kernel(
    q_ptr, k_ptr, v_ptr, t_q_ptr, t_k_ptr, t_v_ptr, d_o_ptr,  # (B, N or M, D) each, packed
    lse_ptr, mean_ptr, delta_ptr, eta_ptr, dq_ptr,  # (B, N) four times, (B, N, D_QK)
    N, M, scale, scale_log2,
    D_QK: tl.constexpr, D_V: tl.constexpr, EVEN_M: tl.constexpr, FLAT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D_QK: tl.constexpr, BLOCK_D_V: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    b, offs_n = locate(N, BLOCK_N, FLAT)
    mask_n = offs_n < N
    rows = b * N + offs_n
    q = load_rows(q_ptr, D_QK, 1, rows, mask_n, 0, D_QK, BLOCK_D_QK)
    t_q = load_rows(t_q_ptr, D_QK, 1, rows, mask_n, 0, D_QK, BLOCK_D_QK)
    d_o = load_rows(d_o_ptr, D_V, 1, rows, mask_n, 0, D_V, BLOCK_D_V)
    lse = tl.load(lse_ptr + rows, mask=mask_n, other=float("inf"))
    mean = tl.load(mean_ptr + rows, mask=mask_n, other=0.0)
    delta = tl.load(delta_ptr + rows, mask=mask_n, other=0.0)
    eta = tl.load(eta_ptr + rows, mask=mask_n, other=0.0)
    dq = tl.zeros((BLOCK_N, BLOCK_D_QK), ACC)
    for start_m in tl.range(0, M, BLOCK_M):
        offs_m = start_m + tl.arange(0, BLOCK_M)
        mask_m = (offs_m < M) | EVEN_M
        keys = b * M + offs_m
        k = load_rows(k_ptr, D_QK, 1, keys, mask_m, 0, D_QK, BLOCK_D_QK)
        t_k = load_rows(t_k_ptr, D_QK, 1, keys, mask_m, 0, D_QK, BLOCK_D_QK)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=ACC)
        p = tl.exp2(s * scale_log2 - lse[:, None])
        if not EVEN_M:
            p = tl.where(mask_m[None, :], p, 0.0)
        t = tl.dot(t_q, tl.trans(k), input_precision=PRECISION, out_dtype=ACC)
        t = tl.dot(q, tl.trans(t_k), t, input_precision=PRECISION, out_dtype=ACC)
        t = t * scale - mean[:, None]
        v = load_rows(v_ptr, D_V, 1, keys, mask_m, 0, D_V, BLOCK_D_V)
        x = tl.dot(d_o, tl.trans(v), input_precision=PRECISION, out_dtype=ACC) - delta[:, None]
        dq = tl.dot((p * x).to(k.dtype), t_k, dq, input_precision=PRECISION, out_dtype=ACC)
        t_v = load_rows(t_v_ptr, D_V, 1, keys, mask_m, 0, D_V, BLOCK_D_V)
        y = tl.dot(d_o, tl.trans(t_v), input_precision=PRECISION, out_dtype=ACC) - eta[:, None]
        dq = tl.dot((p * (t * x + y)).to(k.dtype), k, dq, input_precision=PRECISION, out_dtype=ACC)
    store_rows(dq_ptr, D_QK, dq * scale, rows, mask_n, 0, D_QK, BLOCK_D_QK)


def attention_second(
    d_o: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, lost: Tensor | None,
    t_q: Tensor, t_k: Tensor, t_v: Tensor, scale: float = 1.0, *,
    dkv_config: LaunchConfig | None = None, dq_config: LaunchConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the tangent of attention (B, N, D_V) and the gradients of <d_o, tangent> for q, k and v, like these.

    `out`, `lse` and `lost` are those of `attention_fwd`; tangents `t_q`, `t_k`, `t_v` like q, k, v, of any strides.
    """
    (B, N, D_QK), (_, M, D_V) = q.shape, v.shape
    precision = precision_of(q.dtype)
    tangent, mean = attention_tangent(q, k, v, out, lse, lost, t_q, t_k, t_v, scale)
    d_q, d_k, d_v = (torch.empty(t.shape, device=t.device, dtype=t.dtype) for t in (q, k, v))
    if N == 0 or M == 0:
        return tangent.to(q.dtype), d_q.zero_(), d_k.zero_(), d_v.zero_()
    q, k, v, t_q, t_k, t_v, d_o = (t.contiguous() for t in (q, k, v, t_q, t_k, t_v, d_o))
    delta = attention_bwd_preprocess(d_o, out, lost)
    eta = (d_o.to(tangent.dtype) * tangent).sum(-1)

    def describe(kernel: str, owns_keys: bool, config: LaunchConfig | None) -> Launch:
        own, block = (M, "BLOCK_M") if owns_keys else (N, "BLOCK_N")
        chosen = config or lookup(kernel, arch_of(q), precision, D_QK, D_V, own)
        grid = grid_of(cdiv(own, getattr(chosen, block)), B)
        even = {"EVEN_N": N % chosen.BLOCK_N == 0} if owns_keys else {}
        written = (d_k, d_v) if owns_keys else (d_q,)
        return Launch(
            grid,
            chosen,
            dict(N=N, M=M, scale=float(scale), scale_log2=scale * LOG2_E),
            dict(
                D_QK=D_QK, D_V=D_V, **even, EVEN_M=M % chosen.BLOCK_M == 0, FLAT=len(grid) == 1,
                BLOCK_N=chosen.BLOCK_N, BLOCK_M=chosen.BLOCK_M, BLOCK_D_QK=padded(D_QK), BLOCK_D_V=padded(D_V),
                **arithmetic(precision, chosen),
            ),
            lambda: Needs(
                flops=2 * B * N * M * (5 * D_QK + (3 if owns_keys else 2) * D_V),
                exps=B * N * M,
                bytes_read=size_of(q, k, v, t_q, t_k, t_v, d_o, lse, mean, delta, eta),
                bytes_written=size_of(*written),
            ),
        )  # fmt: skip

    tensors = dict(
        q_ptr=q, k_ptr=k, v_ptr=v, t_q_ptr=t_q, t_k_ptr=t_k, t_v_ptr=t_v, d_o_ptr=d_o,
        lse_ptr=lse, mean_ptr=mean, delta_ptr=delta, eta_ptr=eta,
    )  # fmt: skip
    for name, kernel, results, config in (
        ("attention_second_dkv", _second_dkv_kernel, dict(dk_ptr=d_k, dv_ptr=d_v), dkv_config),
        ("attention_second_dq", _second_dq_kernel, dict(dq_ptr=d_q), dq_config),
    ):
        launch(
            name,
            kernel,
            {**tensors, **results},
            (q.shape, v.shape, scale, precision, config),
            lambda name=name, results=results, config=config: describe(name, "dk_ptr" in results, config),  # type: ignore[misc]
        )
    return tangent.to(q.dtype), d_q, d_k, d_v
