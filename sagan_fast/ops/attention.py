"""softmax(scale q kᵀ) v with a choice of backends, differentiable twice on each."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sagan_fast.kernels.attention import reference
from sagan_fast.kernels.checks import check_ndim, check_same_device, check_shape
from sagan_fast.ops.backends import choose


def attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float = 1.0, backend: str = "auto") -> Tensor:
    """Return softmax(scale q kᵀ) v, (B, N, D_V), softmax over the M keys (Zhang et al. 2019, eq. 1-2).

    `q` (B, N, D_QK), `k` (B, M, D_QK), `v` (B, M, D_V), of one floating dtype and device, any strides. `scale` is 1,
    as in SAGAN, not 1/sqrt(D_QK). `backend` is "eager" (the map in memory), "sdpa" (PyTorch's fused attention),
    "triton" (our kernels) or "auto"; all can be differentiated twice.

    Raises ValueError for shapes that do not fit and unknown backends, TypeError for dtypes that differ, RuntimeError
    if "triton" is asked for where it cannot run.
    """
    check_ndim("attention", "q", q, "B, N, D_QK")
    check_ndim("attention", "v", v, "B, M, D_V")
    B, N, D_QK = q.shape
    M, D_V = v.shape[1:]
    check_shape("attention", "k", k, (B, M, D_QK), "B, M, D_QK")
    check_shape("attention", "v", v, (B, M, D_V), "B, M, D_V")
    check_same_device("attention", "q", q, k=k, v=v)
    if not torch.is_autocast_enabled(q.device.type):
        for name, tensor in (("k", k), ("v", v)):
            if tensor.dtype != q.dtype:
                raise TypeError(f"attention: {name} must have the dtype of q = {q.dtype}, got {tensor.dtype}")
    chosen = choose("attention", backend, q, B, N, M, D_QK, D_V).backend
    return attention_on(chosen, q, k, v, scale)


def attention_on(chosen: str, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Run attention on a backend already chosen, without checks."""
    if chosen == "eager":
        return reference.attention(q, k, v, scale)
    return sdpa(q, k, v, scale)


def sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float = 1.0) -> Tensor:
    """Return softmax(scale q kᵀ) v, (B, N, D_V), by `scaled_dot_product_attention`, laid out so that it really fuses.

    The fused kernels want rows without gaps, on CUDA widths that are multiples of 8, and on the CPU one width for all
    three: what is missing is padded with zeros, which changes neither the scores nor the columns kept. They cannot be
    differentiated twice, so a second derivative goes through the reference.
    """
    differentiable = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if not differentiable or torch.compiler.is_compiling():
        return _fused(q, k, v, scale)
    return _SdpaFunction.apply(q, k, v, scale)  # type: ignore[no-any-return,no-untyped-call]


def _fused(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    D_QK, D_V = q.shape[-1], v.shape[-1]
    if q.device.type == "cuda":
        width_qk, width_v = -(-D_QK // 8) * 8, -(-D_V // 8) * 8
    else:
        width_qk = width_v = max(D_QK, D_V)
    q, k, v = (
        F.pad(tensor, (0, width - tensor.shape[-1])).contiguous().unsqueeze(1)
        for tensor, width in ((q, width_qk), (k, width_qk), (v, width_v))
    )
    out = F.scaled_dot_product_attention(q, k, v, scale=scale)
    return out.squeeze(1)[..., :D_V]


class _SdpaFunction(torch.autograd.Function):
    """Fused attention whose backward is the fused one, unless a graph of the backward is asked for."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.scale = scale
        with torch.enable_grad():
            ctx.leaves = tuple(tensor.detach().requires_grad_(tensor.requires_grad) for tensor in (q, k, v))
            q_leaf, k_leaf, v_leaf = ctx.leaves
            ctx.out = _fused(q_leaf, k_leaf, v_leaf, scale)
        return ctx.out.detach()  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            q, k, v = inputs = ctx.saved_tensors
            out = reference.attention(q, k, v, ctx.scale)
        else:
            inputs, out = ctx.leaves, ctx.out
        found = iter(
            torch.autograd.grad(
                out,
                [tensor for tensor, want in zip(inputs, wanted, strict=True) if want],
                grads[0],
                create_graph=torch.is_grad_enabled(),
                retain_graph=True,
            )
        )
        return (*(next(found) if want else None for want in wanted), None)
