"""The tangent of softmax(scale q kᵀ) v: one sweep over the keys, the map is never in memory.

With P = exp2(scale_log2 q kᵀ - lse) and T = scale (t_q kᵀ + q t_kᵀ): (P T) v + P t_v - rowsum(P T) o. A program owns
BLOCK_N queries of one image. Products accumulate in float32; P and P T are rounded to the inputs' dtype before them.
Oracle: reference.attention_tangent.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import LOG2_E
from ..configs import LaunchConfig, lookup
from ..launch import Launch, Needs, accumulator_dtype, arch_of, launch, precision_of, size_of
from ..tiles import arithmetic, cdiv, grid_of, load_rows, locate, padded, store_rows


@triton.jit
def _tangent_kernel(
    q_ptr, k_ptr, v_ptr, t_q_ptr, t_k_ptr, t_v_ptr,  # (B, N or M, D) each, packed
    out_ptr, lost_ptr, lse_ptr,  # (B, N, D_V), the same or None, (B, N)
    tangent_ptr, mean_ptr,  # (B, N, D_V), (B, N)
    N, M, scale, scale_log2,
    D_QK: tl.constexpr, D_V: tl.constexpr, EVEN_M: tl.constexpr, FLAT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D_QK: tl.constexpr, BLOCK_D_V: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    b, offs_n = locate(N, BLOCK_N, FLAT)
    mask_n = offs_n < N
    rows = b * N + offs_n
    k_ptr += b * M * D_QK
    t_k_ptr += b * M * D_QK
    v_ptr += b * M * D_V
    t_v_ptr += b * M * D_V
    q = load_rows(q_ptr, D_QK, 1, rows, mask_n, 0, D_QK, BLOCK_D_QK)
    t_q = load_rows(t_q_ptr, D_QK, 1, rows, mask_n, 0, D_QK, BLOCK_D_QK)
    lse = tl.load(lse_ptr + rows, mask=mask_n, other=float("inf"))
    mean = tl.zeros((BLOCK_N,), ACC)
    shift = tl.zeros((BLOCK_N,), ACC)
    acc = tl.zeros((BLOCK_N, BLOCK_D_V), ACC)
    for start_m in tl.range(0, M, BLOCK_M):
        offs_m = start_m + tl.arange(0, BLOCK_M)
        mask_m = (offs_m < M) | EVEN_M
        k = load_rows(k_ptr, D_QK, 1, offs_m, mask_m, 0, D_QK, BLOCK_D_QK)
        t_k = load_rows(t_k_ptr, D_QK, 1, offs_m, mask_m, 0, D_QK, BLOCK_D_QK)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=ACC)
        p = tl.exp2(s * scale_log2 - lse[:, None])
        if not EVEN_M:  # exp2(0 - lse) may be infinite, and infinity times a zero is NaN
            p = tl.where(mask_m[None, :], p, 0.0)
        t = tl.dot(t_q, tl.trans(k), input_precision=PRECISION, out_dtype=ACC)
        t = tl.dot(q, tl.trans(t_k), t, input_precision=PRECISION, out_dtype=ACC)
        t *= scale
        # less about their mean, that of the first keys: what is rounded and then cancels is small
        first = tl.sum(p * t, 1) / tl.maximum(tl.sum(p, 1), 1e-30)
        shift = tl.where(start_m == 0, first, shift)
        t = p * (t - shift[:, None])
        mean += tl.sum(t, 1)
        v = load_rows(v_ptr, D_V, 1, offs_m, mask_m, 0, D_V, BLOCK_D_V)
        acc = tl.dot(t.to(v.dtype), v, acc, input_precision=PRECISION, out_dtype=ACC)
        t_v = load_rows(t_v_ptr, D_V, 1, offs_m, mask_m, 0, D_V, BLOCK_D_V)
        acc = tl.dot(p.to(v.dtype), t_v, acc, input_precision=PRECISION, out_dtype=ACC)
    out = load_rows(out_ptr, D_V, 1, rows, mask_n, 0, D_V, BLOCK_D_V).to(ACC)
    if lost_ptr is not None:
        out += load_rows(lost_ptr, D_V, 1, rows, mask_n, 0, D_V, BLOCK_D_V).to(ACC)
    store_rows(tangent_ptr, D_V, acc - mean[:, None] * out, rows, mask_n, 0, D_V, BLOCK_D_V)
    tl.store(mean_ptr + rows, mean + shift, mask=mask_n)


def attention_tangent(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, lost: Tensor | None,
    t_q: Tensor, t_k: Tensor, t_v: Tensor, scale: float = 1.0, *, config: LaunchConfig | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the tangent (B, N, D_V) and the mean (B, N) of each row's logits' tangent, both in the dtype of lse.

    `out`, `lse` and `lost` are those of `attention_fwd`; tangents `t_q`, `t_k`, `t_v` like q, k and v, of any strides.
    """
    (B, N, D_QK), (_, M, D_V) = q.shape, v.shape
    precision, wide = precision_of(q.dtype), accumulator_dtype(q.dtype)
    tangent, mean = (torch.empty(shape, device=q.device, dtype=wide) for shape in ((B, N, D_V), (B, N)))
    if M == 0:
        return tangent.zero_(), mean.zero_()

    def describe() -> Launch:
        chosen = config or lookup("attention_tangent", arch_of(q), precision, D_QK, D_V, N)
        grid = grid_of(cdiv(N, chosen.BLOCK_N), B)
        return Launch(
            grid,
            chosen,
            dict(N=N, M=M, scale=float(scale), scale_log2=scale * LOG2_E),
            dict(
                D_QK=D_QK, D_V=D_V, EVEN_M=M % chosen.BLOCK_M == 0, FLAT=len(grid) == 1,
                BLOCK_N=chosen.BLOCK_N, BLOCK_M=chosen.BLOCK_M, BLOCK_D_QK=padded(D_QK), BLOCK_D_V=padded(D_V),
                **arithmetic(precision, chosen),
            ),
            lambda: Needs(
                flops=2 * B * N * M * (3 * D_QK + 2 * D_V),
                exps=B * N * M,
                bytes_read=2 * size_of(q, k, v) + size_of(out, lost, lse),
                bytes_written=size_of(tangent, mean),
            ),
        )  # fmt: skip

    q, k, v, t_q, t_k, t_v = (t.contiguous() for t in (q, k, v, t_q, t_k, t_v))
    tensors = dict(
        q_ptr=q, k_ptr=k, v_ptr=v, t_q_ptr=t_q, t_k_ptr=t_k, t_v_ptr=t_v,
        out_ptr=out, lost_ptr=lost, lse_ptr=lse, tangent_ptr=tangent, mean_ptr=mean,
    )  # fmt: skip
    launch("attention_tangent", _tangent_kernel, tensors, (q.shape, v.shape, scale, precision, config), describe)
    return tangent, mean
