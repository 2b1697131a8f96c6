"""softmax(scale q kᵀ) v in plain PyTorch, the map in memory: the truth the kernels are held against.

Formula: Zhang et al. 2019, eq. 1-2 (no 1/sqrt(d) in SAGAN, so `scale` is 1). Differentiable any number of times; in
float64 it is the oracle of the tests, in lower precision the `eager` backend.
"""

import torch
from torch import Tensor

from ..checks import is_autocast_on


def _is_half(x: Tensor) -> bool:
    """Return whether products with `x` are computed in float16."""
    if is_autocast_on(x.device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type) == torch.float16
    return x.dtype == torch.float16


def attention_map(q: Tensor, k: Tensor, scale: float = 1.0) -> Tensor:
    """Return beta = softmax(scale q kᵀ) over keys, (B, N, M), from `q` (B, N, D_QK) and `k` (B, M, D_QK).

    For float16, also autocast's, scores and beta are float32, as in the kernels.
    """
    if _is_half(q):  # whose largest number, 65,504, scores may exceed
        with torch.autocast(q.device.type, enabled=False):
            return torch.softmax(torch.bmm(q.float(), k.float().transpose(1, 2)) * scale, dim=-1)
    logits = torch.bmm(q, k.transpose(1, 2))
    return torch.softmax(logits if scale == 1.0 else logits * scale, dim=-1)


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float = 1.0) -> Tensor:
    """Return softmax(scale q kᵀ) v, (B, N, D_V), from `q` (B, N, D_QK), `k` (B, M, D_QK), `v` (B, M, D_V)."""
    beta = attention_map(q, k, scale)
    return torch.bmm(beta if beta.dtype == v.dtype else beta.to(v.dtype), v)  # autocast's softmax returns float32


def attention_tangent(
    q: Tensor, k: Tensor, v: Tensor, t_q: Tensor, t_k: Tensor, t_v: Tensor, scale: float = 1.0
) -> Tensor:
    """Return the tangent of `attention(q, k, v, scale)`, (B, N, D_V), for the tangents of q, k and v.

    With P the map and T = scale (t_q kᵀ + q t_kᵀ) the tangent of its logits, that is P (T - rowsum(P T)) v + P t_v.
    """
    dtype = q.dtype
    q, k, v, t_q, t_k, t_v = _wide(q, k, v, t_q, t_k, t_v)
    with torch.autocast(q.device.type, enabled=False):
        beta = attention_map(q, k, scale)
        t_beta = beta * _centred(_logits_tangent(q, k, t_q, t_k, scale), beta)
        return (torch.bmm(t_beta, v) + torch.bmm(beta, t_v)).to(dtype)


def attention_gradients(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v for `d_out` (B, N, D_V), as plain products, which any transform takes."""
    dtype = q.dtype
    d_out, q, k, v = _wide(d_out, q, k, v)
    with torch.autocast(q.device.type, enabled=False):
        beta = attention_map(q, k, scale)
        d_s = beta * _centred(torch.bmm(d_out, v.transpose(1, 2)), beta)
        d_q, d_k = scale * torch.bmm(d_s, k), scale * torch.bmm(d_s.transpose(1, 2), q)
        return d_q.to(dtype), d_k.to(dtype), torch.bmm(beta.transpose(1, 2), d_out).to(dtype)


def attention_second(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, t_q: Tensor, t_k: Tensor, t_v: Tensor, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the tangent of attention, (B, N, D_V), and the gradients of <d_out, tangent> for q, k and v.

    They are a second backward, for the gradients t_q, t_k, t_v of (d_q, d_k, d_v), and the tangent of a backward. P and
    T are as in `attention_tangent`, X = d_out vᵀ, Y = d_out t_vᵀ. T' and X' are T and X less, in each row, their mean
    with the weights P:

        dS = P X',  R = P (T' X' + Y - rowsum(P (T' X' + Y))),
        d_q = scale (dS t_k + R k),  d_k = scale (dSᵀ t_q + Rᵀ q),  d_v = (P T')ᵀ d_out.
    """
    dtype = q.dtype
    d_out, q, k, v, t_q, t_k, t_v = _wide(d_out, q, k, v, t_q, t_k, t_v)
    with torch.autocast(q.device.type, enabled=False):
        beta = attention_map(q, k, scale)
        centred_t = _centred(_logits_tangent(q, k, t_q, t_k, scale), beta)
        centred_x = _centred(torch.bmm(d_out, v.transpose(1, 2)), beta)
        t_beta, d_s = beta * centred_t, beta * centred_x
        r = beta * _centred(centred_t * centred_x + torch.bmm(d_out, t_v.transpose(1, 2)), beta)
        return (
            (torch.bmm(t_beta, v) + torch.bmm(beta, t_v)).to(dtype),
            (scale * (torch.bmm(d_s, t_k) + torch.bmm(r, k))).to(dtype),
            (scale * (torch.bmm(d_s.transpose(1, 2), t_q) + torch.bmm(r.transpose(1, 2), q))).to(dtype),
            torch.bmm(t_beta.transpose(1, 2), d_out).to(dtype),
        )


def _wide(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors, those of 16 bits in float32: derivatives beyond the first are small differences."""
    return tuple(t.float() if t.dtype.itemsize < 4 else t for t in tensors)


def _logits_tangent(q: Tensor, k: Tensor, t_q: Tensor, t_k: Tensor, scale: float) -> Tensor:
    return scale * (torch.bmm(t_q, k.transpose(1, 2)) + torch.bmm(q, t_k.transpose(1, 2)))


def _centred(rows: Tensor, beta: Tensor) -> Tensor:
    """Return `rows` (B, N, M) less, in each row, their mean under the weights `beta`."""
    return rows - (beta * rows).sum(-1, keepdim=True)
