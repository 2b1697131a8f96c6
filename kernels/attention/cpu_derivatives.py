"""The tangent of softmax(scale q kᵀ) v and its second gradients, a chunk of the map at a time, in PyTorch's products.

Made for the CPU (see cpu.py), and right on any device: where a fused kernel has no second derivative, this is it.
Formulas: reference.attention_tangent and reference.attention_second. A row's number (its log-sum-exp, its mean) is
taken off in the product itself, by one more column. 16-bit inputs are computed in float32.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import LOG2_E
from .chunks import Buffer, Chunk, KeySums, parts_of, share


def attention_tangent(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, t_q: Tensor, t_k: Tensor, t_v: Tensor, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Return the tangent of attention, (B, N, D_V), and the mean of each row's logits' tangent under P, (B, N, 1).

    `t_q`, `t_k` and `t_v` are the tangents of q, k and v; `out` and `lse` (base 2) come from a forward.
    """
    (B, N, _), (_, M, D_V) = q.shape, v.shape
    with torch.no_grad():
        q_lse, k_one = _less(q * (scale * LOG2_E), lse), _one(k)
        t_rows, t_keys = torch.cat([t_q, q], -1) * scale, torch.cat([k, t_k], -1).transpose(1, 2)
        v_one = torch.cat([v, v.new_ones(B, M, 1)], -1)
        tangent = q.new_empty(B, N, D_V + 1)  # the last column is the mean

        def work(part: Sequence[Chunk]) -> None:
            for_p, for_t = Buffer(q, part, M), Buffer(q, part, M)
            for images, rows in part:
                p, t = for_p(images, rows), for_t(images, rows)
                torch.bmm(q_lse[images, rows], k_one[images], out=p).exp2_()
                torch.bmm(t_rows[images, rows], t_keys[images], out=t).mul_(p)
                torch.bmm(t, v_one[images], out=tangent[images, rows])
                tangent[images, rows, :D_V] += torch.bmm(p, t_v[images])

        share(work, parts_of(q, M))
        mean = tangent[..., D_V:]
        return torch.addcmul(tangent[..., :D_V], mean, out, value=-1), mean


def attention_second(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    t_q: Tensor, t_k: Tensor, t_v: Tensor, scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the tangent of attention and the gradients of <d_out, tangent> for q, k and v, as the reference does.

    The same bits on every call with the same number of threads.
    """
    (B, N, D_QK), (_, M, D_V) = q.shape, v.shape
    with torch.no_grad():
        tangent, mean = attention_tangent(q, k, v, out, lse, t_q, t_k, t_v, scale)
        q_lse, k_one = _less(q * (scale * LOG2_E), lse), _one(k)
        t_rows = _less(torch.cat([t_q, q], -1) * scale, mean)
        t_keys = _one(torch.cat([k, t_k], -1))
        x_rows, v_one = _less(d_out, (d_out * out).sum(-1, keepdim=True)), _one(v)
        y_rows, t_v_one = _less(d_out, (d_out * tangent).sum(-1, keepdim=True)), _one(t_v)
        q_t, t_q_t = q.transpose(1, 2).contiguous(), t_q.transpose(1, 2).contiguous()
        k_t, t_k_t = k.transpose(1, 2).contiguous(), t_k.transpose(1, 2).contiguous()
        d_out_t = d_out.transpose(1, 2).contiguous()
        parts = parts_of(q, M)
        d_q = q.new_empty(B, D_QK, N)
        sums = KeySums(q, parts, B, M, (D_QK, D_V))

        def work(part: Sequence[Chunk]) -> None:
            for_p, for_t, for_x, for_y = (Buffer(q, part, M) for _ in range(4))
            for images, rows in part:
                p, t, x, y = (buffer(images, rows) for buffer in (for_p, for_t, for_x, for_y))
                d_k, d_v = sums.of(part, images)
                torch.bmm(q_lse[images, rows], k_one[images], out=p).exp2_()
                torch.bmm(t_rows[images, rows], t_keys[images], out=t)
                torch.bmm(x_rows[images, rows], v_one[images], out=x)
                torch.bmm(y_rows[images, rows], t_v_one[images], out=y)
                r, d_s, t_p = y.addcmul_(t, x).mul_(p), x.mul_(p), t.mul_(p)
                d_q_rows = torch.bmm(k_t[images], r.transpose(1, 2), out=d_q[images, :, rows])
                d_q_rows.baddbmm_(t_k_t[images], d_s.transpose(1, 2))
                d_k.baddbmm_(q_t[images, :, rows], r).baddbmm_(t_q_t[images, :, rows], d_s)
                d_v.baddbmm_(d_out_t[images, :, rows], t_p)

        share(work, parts)
        d_k, d_v = sums.total()
        return tangent, d_q.mul_(scale).transpose(1, 2), d_k.mul_(scale), d_v


def _less(rows: Tensor, number: Tensor) -> Tensor:
    """Return `rows` (B, N, D) with minus each row's `number` (B, N, 1) as a last column, to go with `_one`."""
    return torch.cat([rows, -number], -1)


def _one(keys: Tensor) -> Tensor:
    """Return `keys` (B, M, D) with ones as a last column, transposed: (B, D + 1, M)."""
    B, M, _ = keys.shape
    return torch.cat([keys, keys.new_ones(B, M, 1)], -1).transpose(1, 2)
