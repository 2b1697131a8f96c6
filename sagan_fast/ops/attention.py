"""softmax(scale q kᵀ) v with a choice of backends, differentiable twice on each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sagan_fast.kernels.attention import cpu, reference
from sagan_fast.kernels.checks import check_ndim, check_same_device, check_shape
from sagan_fast.kernels.launch import accumulator_dtype
from sagan_fast.ops.backends import choose, is_autocast_on, product_dtype


def attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float = 1.0, backend: str = "auto") -> Tensor:
    """Return softmax(scale q kᵀ) v, (B, N, D_V), softmax over the M keys (Zhang et al. 2019, eq. 1-2).

    `q` (B, N, D_QK), `k` (B, M, D_QK), `v` (B, M, D_V), of one floating dtype and device, any strides. `scale` is 1,
    as in SAGAN, not 1/sqrt(D_QK). `backend` is "eager" (the map in memory), "sdpa" (PyTorch's fused attention),
    "triton" (our kernels) or "auto" (the fastest here; on the CPU it may be products in blocks that "sdpa" has no
    equal for); all can be differentiated twice.

    Raises ValueError for shapes that do not fit, unknown backends and sizes above what "triton" covers (D_QK 64,
    D_V 256) where it is asked for, TypeError for dtypes that differ, RuntimeError if "triton" is asked for where it
    cannot run.
    """
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


def attention_on(chosen: str, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Run attention on a backend already chosen, without checks."""
    if chosen == "eager":
        return reference.attention(q, k, v, scale)
    if chosen == "triton":
        return _fused_by_triton(q, k, v, scale)
    if chosen == "cpu" and cpu.supports(q, k, v):
        return on_the_cpu(q, k, v, scale)
    return sdpa(q, k, v, scale)


def sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float = 1.0) -> Tensor:
    """Return softmax(scale q kᵀ) v, (B, N, D_V), by `scaled_dot_product_attention`, laid out so that it really fuses.

    The fused kernels want rows without gaps, on CUDA widths that are multiples of 8, and on the CPU one width for all
    three: what is missing is padded with zeros, which changes neither the scores nor the columns kept. They cannot be
    differentiated twice, so a second derivative goes through the reference.
    """
    if not _differentiable(q, k, v) or torch.compiler.is_compiling():
        return _fused(q, k, v, scale)
    return _SdpaFunction.apply(q, k, v, scale)  # type: ignore[no-any-return,no-untyped-call]


def on_the_cpu(q: Tensor, k: Tensor, v: Tensor, scale: float = 1.0) -> Tensor:
    """Return softmax(scale q kᵀ) v, (B, N, D_V), on the CPU, a chunk of the map at a time.

    Takes what `cpu.supports`. A second derivative goes through the reference.
    """
    if not _differentiable(q, k, v):
        return cpu.attention_fwd(q, k, v, scale)[0]
    return _KernelFunction.apply(q, k, v, scale, "cpu")  # type: ignore[no-any-return,no-untyped-call]


def _differentiable(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


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
        if torch.is_grad_enabled():
            q, k, v = inputs = ctx.saved_tensors
            out = reference.attention(q, k, v, ctx.scale)
        else:
            inputs, out = ctx.leaves, ctx.out
        return (*gradients(out, inputs, grads[0], wanted), None)


class _KernelFunction(torch.autograd.Function):
    """The Triton kernels or kernels/attention/cpu.py, unless a graph of the backward is asked for: then the reference.

    Keeps q, k, v, the output and a number a query, O(N).
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, chosen: str) -> Tensor:
        if chosen == "cpu":
            out, lse = cpu.attention_fwd(q, k, v, scale)
        else:
            out, lse = torch.ops.sagan_fast.attention(q, k, v, scale, True)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.scale, ctx.chosen = scale, chosen
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            with torch.autocast(q.device.type, enabled=False):
                found = gradients(reference.attention(q, k, v, ctx.scale), (q, k, v), grads[0], wanted)
            return (*found, None, None)
        backward = cpu.attention_bwd if ctx.chosen == "cpu" else torch.ops.sagan_fast.attention_backward
        found = backward(grads[0], q, k, v, out, lse, ctx.scale)
        return (*(grad if want else None for grad, want in zip(found, wanted, strict=True)), None, None)


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
    if _differentiable(q, k, v):
        return _KernelFunction.apply(q, k, v, scale, "triton")  # type: ignore[no-any-return,no-untyped-call]
    return torch.ops.sagan_fast.attention(q, k, v, scale, False)[0]  # type: ignore[no-any-return]


# Opaque to torch.compile; differentiated by the Function above, so that a second derivative can take another way.
LIBRARY = torch.library.Library("sagan_fast", "FRAGMENT")  # type: ignore[no-untyped-call]


def define(schema: str) -> None:
    """Define an op of `LIBRARY` that keeps the strides of its inputs under torch.compile."""
    tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
    LIBRARY.define(schema, tags=tags)  # type: ignore[no-untyped-call]


define("attention(Tensor q, Tensor k, Tensor v, float scale, bool save) -> (Tensor, Tensor)")
define(
    "attention_backward(Tensor d_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, float scale)"
    " -> (Tensor, Tensor, Tensor)",
)


@torch.library.impl(LIBRARY, "attention", "CompositeExplicitAutograd")
def _attention(q: Tensor, k: Tensor, v: Tensor, scale: float, save: bool) -> tuple[Tensor, Tensor]:
    from sagan_fast.kernels.attention.forward import attention_fwd

    out, lse = attention_fwd(q, k, v, scale, save=save)
    return out, q.new_empty(0, dtype=accumulator_dtype(q.dtype)) if lse is None else lse


@torch.library.register_fake("sagan_fast::attention", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _attention_fake(q: Tensor, k: Tensor, v: Tensor, scale: float, save: bool) -> tuple[Tensor, Tensor]:
    B, N, _ = q.shape
    return q.new_empty(B, N, v.shape[2]), q.new_empty((B, N) if save else (0,), dtype=accumulator_dtype(q.dtype))


@torch.library.impl(LIBRARY, "attention_backward", "CompositeExplicitAutograd")
def _attention_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    from sagan_fast.kernels.attention.backward import attention_bwd

    return attention_bwd(d_out, q, k, v, out, lse, scale)


@torch.library.register_fake("sagan_fast::attention_backward", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _attention_backward_fake(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
