"""torch.ops.sagan_fast.attention and its derivatives: on Triton, or a chunk of the map at a time.

`chosen` is "triton" or "cpu". Everywhere `lse` is the log-sum-exp, (B, N), and `lost` what o lost by rounding to 16
bits, (B, N, D_V), or (B, N, 0) for wider dtypes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sagan_fast.kernels.attention import cpu, cpu_derivatives
from sagan_fast.kernels.configs import has_rows
from sagan_fast.kernels.launch import accumulator_dtype, precision_of
from sagan_fast.ops.library import LIBRARY, define

Tensors = tuple[Tensor, ...]

_SAVED = "Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor lost"
_TANGENTS = "Tensor t_q, Tensor t_k, Tensor t_v"
define("attention(Tensor q, Tensor k, Tensor v, float scale, bool save, str chosen) -> (Tensor, Tensor, Tensor)")
define(f"attention_gradients(Tensor d_out, {_SAVED}, float scale, str chosen) -> (Tensor, Tensor, Tensor)")
define(f"attention_tangent({_SAVED}, {_TANGENTS}, float scale, str chosen) -> Tensor")
define(
    f"attention_second(Tensor d_out, {_SAVED}, {_TANGENTS}, float scale, str chosen)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)


@torch.library.impl(LIBRARY, "attention", "CompositeExplicitAutograd")
def _attention(q: Tensor, k: Tensor, v: Tensor, scale: float, save: bool, chosen: str) -> Tensors:
    if chosen == "triton":
        from sagan_fast.kernels.attention.forward import attention_fwd

        out, lse, lost = attention_fwd(q, k, v, scale, save=save)
        lse = q.new_empty(0, dtype=accumulator_dtype(q.dtype)) if lse is None else lse
        return out, lse, q.new_empty(*out.shape[:2], 0) if lost is None else lost
    if _is_empty(q, v):
        out, lse = q.new_zeros(*q.shape[:2], v.shape[2]), q.new_full(q.shape[:2], -torch.inf)
        return out, lse.to(accumulator_dtype(q.dtype)), torch.zeros_like(out) if q.dtype.itemsize < 4 else out[..., :0]
    out, lse = _in_float(cpu.attention_fwd, q, k, v, scale=scale)
    lse = lse.squeeze(-1) if save else lse.new_empty(0)
    if out.dtype == q.dtype:
        return out, lse, out.new_empty(*out.shape[:2], 0)
    rounded = out.to(q.dtype)
    return rounded, lse, (out - rounded).to(q.dtype)


@torch.library.register_fake("sagan_fast::attention", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _attention_fake(q: Tensor, k: Tensor, v: Tensor, scale: float, save: bool, chosen: str) -> Tensors:
    (B, N, _), D_V, wide = q.shape, v.shape[2], accumulator_dtype(q.dtype)
    lost = q.new_empty(B, N, D_V if save and wide != q.dtype else 0)
    return q.new_empty(B, N, D_V), q.new_empty((B, N) if save else (0,), dtype=wide), lost


@torch.library.impl(LIBRARY, "attention_gradients", "CompositeExplicitAutograd")
def _gradients(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, lost: Tensor, scale: float, chosen: str
) -> Tensors:
    if chosen == "triton":
        from sagan_fast.kernels.attention.backward import attention_bwd

        return attention_bwd(d_out, q, k, v, out, lse, _given(lost), scale)
    if _is_empty(q, v):
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    return _rounded(q, _in_float(cpu.attention_bwd, d_out, q, k, v, _whole(out, lost), lse, scale=scale))


@torch.library.register_fake("sagan_fast::attention_gradients", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _gradients_fake(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, lost: Tensor, scale: float, chosen: str
) -> Tensors:
    return _like(q, chosen), _like(k, chosen), _like(v, chosen)


@torch.library.impl(LIBRARY, "attention_tangent", "CompositeExplicitAutograd")
def _tangent(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, lost: Tensor, t_q: Tensor, t_k: Tensor, t_v: Tensor,
    scale: float, chosen: str,
) -> Tensor:  # fmt: skip
    if chosen == "triton":
        from sagan_fast.kernels.attention.tangent import attention_tangent

        return attention_tangent(q, k, v, out, lse, _given(lost), t_q, t_k, t_v, scale)[0].to(q.dtype)
    if _is_empty(q, v):
        return torch.zeros_like(out)
    tensors = (q, k, v, _whole(out, lost), lse, t_q, t_k, t_v)
    return _in_float(cpu_derivatives.attention_tangent, *tensors, scale=scale)[0].to(q.dtype)


@torch.library.register_fake("sagan_fast::attention_tangent", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _tangent_fake(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, lost: Tensor, t_q: Tensor, t_k: Tensor, t_v: Tensor,
    scale: float, chosen: str,
) -> Tensor:  # fmt: skip
    return out.new_empty(out.shape)


@torch.library.impl(LIBRARY, "attention_second", "CompositeExplicitAutograd")
def _second(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, lost: Tensor, t_q: Tensor, t_k: Tensor,
    t_v: Tensor, scale: float, chosen: str,
) -> Tensors:  # fmt: skip
    if _second_by(chosen, q, v) == "triton":
        from sagan_fast.kernels.attention.second import attention_second

        return attention_second(d_out, q, k, v, out, lse, _given(lost), t_q, t_k, t_v, scale)
    if _is_empty(q, v):
        return torch.zeros_like(out), torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    tensors = (d_out, q, k, v, _whole(out, lost), lse, t_q, t_k, t_v)
    return _rounded(q, _in_float(cpu_derivatives.attention_second, *tensors, scale=scale))


@torch.library.register_fake("sagan_fast::attention_second", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _second_fake(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, lost: Tensor, t_q: Tensor, t_k: Tensor,
    t_v: Tensor, scale: float, chosen: str,
) -> Tensors:  # fmt: skip
    chosen = _second_by(chosen, q, v)
    return out.new_empty(out.shape), _like(q, chosen), _like(k, chosen), _like(v, chosen)


def _second_by(chosen: str, q: Tensor, v: Tensor) -> str:
    """Return what second gradients run on: "cpu" also where no tile of the kernel fits, in wide float32."""
    widths = q.shape[2], v.shape[2]
    return chosen if chosen != "triton" or has_rows("attention_second_dkv", precision_of(q.dtype), *widths) else "cpu"


def _like(t: Tensor, chosen: str) -> Tensor:
    """Return what a gradient of `t` looks like: the chunks make theirs transposed."""
    B, rows, D = t.shape
    return t.new_empty(t.shape) if chosen == "triton" else t.new_empty(B, D, rows).transpose(1, 2)


def _is_empty(q: Tensor, v: Tensor) -> bool:
    """Return whether there are no images, no queries, no keys or no values."""
    return 0 in (*q.shape[:2], *v.shape[1:])


def _given(lost: Tensor) -> Tensor | None:
    return lost if lost.shape[2] else None


def _whole(out: Tensor, lost: Tensor) -> Tensor:
    """Return `out` with what it `lost` by rounding, float32 then."""
    return out.float() + lost if lost.shape[2] else out


def _in_float(function: Callable[..., Tensors], *tensors: Tensor, scale: float) -> Tensors:
    """Call `function` on the tensors, those of 16 bits in float32, and log-sum-exps with a last axis of length 1."""
    wide = (t if t.dtype in (torch.float32, torch.float64) else t.float() for t in tensors)
    with torch.autocast(tensors[0].device.type, enabled=False):
        return function(*(t if t.ndim == 3 else t.unsqueeze(-1) for t in wide), scale)


def _rounded(q: Tensor, found: Tensors) -> Tensors:
    return tuple(t.to(q.dtype) for t in found)
