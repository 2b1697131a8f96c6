"""softmax(scale q kᵀ) v with a choice of backends, differentiable twice on each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sagan_fast.kernels.attention import cpu, reference
from sagan_fast.kernels.checks import check_ndim, check_same_device, check_shape
from sagan_fast.ops.backends import choose, is_autocast_on, product_dtype
from sagan_fast.ops.derivatives import Attention, gradients_for
from sagan_fast.ops.library import is_transformed


def attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float = 1.0, backend: str = "auto") -> Tensor:
    """Return softmax(scale q kᵀ) v, (B, N, D_V), softmax over the M keys (Zhang et al. 2019, eq. 1-2).

    `q` (B, N, D_QK), `k` (B, M, D_QK), `v` (B, M, D_V), of one floating dtype and device, any strides. All three may
    have an axis of heads after the batch: q (B, H, N, D_QK) gives (B, H, N, D_V). `scale` is 1, as in SAGAN, not
    1/sqrt(D_QK). `backend` is "eager" (the map in memory), "sdpa" (PyTorch's fused attention), "triton" (our kernels)
    or "auto", the fastest here. On the CPU that may be a chunk of the map at a time. `sagan_fast.explain(q, k, v)` says
    which one "auto" takes, and why.

    All can be differentiated twice, have tangents (forward mode) and go through `torch.func`. Except on "eager", this
    takes memory of order N + M. A third derivative, and transforms under torch.compile, take the map in memory.

    Raises ValueError for shapes that do not fit, unknown backends and sizes above what "triton" covers (D_QK 64,
    D_V 256) where it is asked for, TypeError for dtypes that differ, RuntimeError if "triton" is asked for where it
    cannot run.
    """
    if q.ndim == 4:
        return _heads(q, k, v, scale, backend)
    check_ndim("attention", "q", q, "B, N, D_QK")
    check_ndim("attention", "v", v, "B, M, D_V")
    B, N, D_QK = q.shape
    M, D_V = v.shape[1:]
    check_shape("attention", "k", k, (B, M, D_QK), "B, M, D_QK")
    check_shape("attention", "v", v, (B, M, D_V), "B, M, D_V")
    check_same_device("attention", "q", q, k=k, v=v)
    if not is_autocast_on(q.device):
        for name, tensor in (("k", k), ("v", v)):
            if tensor.dtype != q.dtype:
                raise TypeError(f"attention: {name} must have the dtype of q, {q.dtype}, got {tensor.dtype}")
    chosen = choose("attention", backend, q, B, N, M, D_QK, D_V).backend
    return attention_on(chosen, q, k, v, scale)


def _heads(q: Tensor, k: Tensor, v: Tensor, scale: float, backend: str) -> Tensor:
    B, H, N, D_QK = q.shape
    check_ndim("attention", "v", v, "B, H, M, D_V")
    M, D_V = v.shape[2:]
    check_shape("attention", "k", k, (B, H, M, D_QK), "B, H, M, D_QK")
    check_shape("attention", "v", v, (B, H, M, D_V), "B, H, M, D_V")
    together = (t.flatten(0, 1) for t in (q, k, v))
    return attention(*together, scale=scale, backend=backend).view(B, H, N, D_V)


def attention_on(chosen: str, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Run attention on a backend already chosen, without checks."""
    if chosen == "eager" or (torch.compiler.is_compiling() and is_transformed()):  # Dynamo drops a Function's `jvp`
        return reference.attention(q, k, v, scale)
    if chosen == "triton":
        return _fused_by_triton(q, k, v, scale)
    if chosen == "cpu" and cpu.supports(q, k, v):
        return on_the_cpu(q, k, v, scale)
    return sdpa(q, k, v, scale)


def sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float = 1.0) -> Tensor:
    """Return softmax(scale q kᵀ) v, (B, N, D_V), by `scaled_dot_product_attention`, laid out so that it really fuses.

    The fused kernels want rows without gaps, on CUDA widths that are multiples of 8, and on the CPU one width for all
    three: what is missing is padded with zeros, which changes neither the scores nor the columns kept. They have one
    derivative. Second ones, tangents and transforms of `torch.func` go a chunk of the map at a time.
    """
    if torch.compiler.is_compiling() or not _differentiable(q, k, v):
        return _fused(q, k, v, scale)
    if is_transformed():
        q, k, v = (t.to(product_dtype(t)) for t in (q, k, v))
        return Attention.apply(q, k, v, scale, "cpu")[0]  # type: ignore[no-any-return,no-untyped-call]
    return _SdpaFunction.apply(q, k, v, scale)  # type: ignore[no-any-return,no-untyped-call]


def on_the_cpu(q: Tensor, k: Tensor, v: Tensor, scale: float = 1.0) -> Tensor:
    """Return softmax(scale q kᵀ) v, (B, N, D_V), on the CPU, a chunk of the map at a time.

    Takes what `cpu.supports`.
    """
    if not _differentiable(q, k, v):
        return cpu.attention_fwd(q, k, v, scale)[0]
    return Attention.apply(q, k, v, scale, "cpu")[0]  # type: ignore[no-any-return,no-untyped-call]


def _differentiable(*tensors: Tensor) -> bool:
    return is_transformed() or torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _fused(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    if q.device.type == "cpu" and k.shape[-2] < FEW_KEYS:
        return reference.attention(q, k, v, scale)
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


FEW_KEYS = 16
"""With fewer, PyTorch's fused attention on the CPU gives numbers where a query is NaN (2.14.1)."""


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
        q, k, v = ctx.saved_tensors  # also where they are not used: PyTorch then refuses a second backward
        if not torch.is_grad_enabled() and not is_transformed():
            return (*gradients(ctx.out, ctx.leaves, grads[0], wanted), None)
        with torch.no_grad():
            saved = Attention.forward(q.detach(), k.detach(), v.detach(), ctx.scale, "cpu")
        found = gradients_for(grads[0], q, k, v, *saved, scale=ctx.scale, chosen="cpu")
        return (*(grad if want else None for grad, want in zip(found, wanted, strict=True)), None)


class _CompiledFunction(torch.autograd.Function):
    """The Triton kernels under torch.compile, which takes no function with a `jvp`."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        out, lse, lost = torch.ops.sagan_fast.attention(q, k, v, scale, True, "triton")
        ctx.save_for_backward(q, k, v, out, lse, lost)
        ctx.scale = scale
        return out  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        found = torch.ops.sagan_fast.attention_gradients(grads[0], *ctx.saved_tensors, ctx.scale, "triton")
        return (*found, None)


def gradients(
    out: Tensor, inputs: Sequence[Tensor | None], d_out: Tensor, wanted: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Return the gradients of `out` for those of `inputs` that are `wanted`, None for the others.

    In grad mode (inside a backward with create_graph=True) they can be differentiated again.
    """
    found = iter(
        torch.autograd.grad(
            out,
            [tensor for tensor, want in zip(inputs, wanted, strict=True) if want and tensor is not None],
            d_out,
            create_graph=torch.is_grad_enabled(),
            retain_graph=True,
            allow_unused=True,
        )
    )
    return tuple(next(found) if want else None for want in wanted)


def _fused_by_triton(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    dtype = product_dtype(q)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if torch.compiler.is_compiling():
        return _CompiledFunction.apply(q, k, v, scale)  # type: ignore[no-any-return,no-untyped-call]
    if _differentiable(q, k, v):
        return Attention.apply(q, k, v, scale, "triton")[0]  # type: ignore[no-any-return,no-untyped-call]
    return torch.ops.sagan_fast.attention(q, k, v, scale, False, "triton")[0]  # type: ignore[no-any-return]
