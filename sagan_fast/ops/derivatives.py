"""Attention and its first and second derivatives, gradients and tangents, as functions of PyTorch in O(N) memory.

Four functions refer to each other, so that `torch.autograd`, `torch.func` and forward-mode AD compose. What each
computes, and which of them give its backward and its tangent:

    Attention   o                                  backward: Gradients         tangent: Tangent
    Gradients   (d_q, d_k, d_v)                    backward: Second            tangent: the sum of Second and Gradients
    Tangent     the tangent of o                   backward: Second for q, k, v; Gradients for their tangents
    Second      the tangent, and the gradients of <d_out, tangent>

What lies beyond (a third derivative, a tangent of a tangent) goes through the reference, with the map in memory.
Formulas: kernels/attention/reference.py. `chosen` is "triton", or "cpu" for a chunk of the map at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sagan_fast.kernels.attention import reference
from sagan_fast.ops import attention_ops  # noqa: F401, it defines torch.ops.sagan_fast.*

Tensors = tuple[Tensor, ...]


class _Function(torch.autograd.Function):
    """A function whose `vmap` puts the mapped axis and the batch together: its tensors all begin with the batch."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.vmap = staticmethod(functools.partial(_mapped, cls))  # type: ignore[method-assign]


def _mapped(function: Any, info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
    size = info.batch_size
    flat = []
    for dim, arg in zip(in_dims, args, strict=True):
        if isinstance(arg, Tensor):
            arg = arg.movedim(dim, 0) if dim is not None else arg.expand(size, *arg.shape)
            arg = arg.flatten(0, 1)
        flat.append(arg)
    found = function.apply(*flat)
    several = isinstance(found, tuple)
    found = tuple(t.unflatten(0, (size, t.shape[0] // size)) for t in (found if several else (found,)))
    return (found, (0,) * len(found)) if several else (found[0], 0)


def _keep(ctx: Any, *tensors: Tensor) -> None:
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)


def _zeros_for(tangents: tuple[Tensor | None, ...], like: tuple[Tensor, ...]) -> Tensors:
    return tuple(torch.zeros_like(x) if t is None else t for t, x in zip(tangents, like, strict=True))


def is_old_batch(*grads: Tensor) -> bool:
    """Return whether `grads` are those of `torch.autograd.grad(is_grads_batched=True)`.

    PyTorch's old vmap, which makes them, calls ops and no Function.
    """
    return any(torch._C._functorch.is_legacy_batchedtensor(grad) for grad in grads)


def gradients_for(d_out: Tensor, *saved: Tensor, scale: float, chosen: str) -> Tensors:
    """Return the gradients of q, k and v; `saved` are q, k, v and the results of `Attention`."""
    if not is_old_batch(d_out):
        return Gradients.apply(d_out, *saved, scale, chosen)  # type: ignore[no-any-return,no-untyped-call]
    if torch.is_grad_enabled():  # an op has no derivative of its own
        q, k, v = saved[:3]
        return reference.attention_gradients(d_out, q, k, v, scale)
    return torch.ops.sagan_fast.attention_gradients(d_out, *saved, scale, chosen)  # type: ignore[no-any-return]


class Attention(_Function):
    """softmax(scale q kᵀ) v, and what its derivatives need of it: the log-sum-exp and what o lost by rounding."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, scale: float, chosen: str) -> Tensors:
        return torch.ops.sagan_fast.attention(q, k, v, scale, True, chosen)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *qkv, ctx.scale, ctx.chosen = inputs
        ctx.mark_non_differentiable(*output[1:])
        _keep(ctx, *qkv, *output)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        found = gradients_for(grads[0], *ctx.saved_tensors, scale=ctx.scale, chosen=ctx.chosen)
        wanted = ctx.needs_input_grad[:3]
        return (*(grad if want else None for grad, want in zip(found, wanted, strict=True)), None, None)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        saved = ctx.saved_tensors
        given = _zeros_for(tangents[:3], saved[:3])
        tangent = Tangent.apply(*saved, *given, ctx.scale, ctx.chosen)  # type: ignore[no-untyped-call]
        return tangent, None, None


class Gradients(_Function):
    """The gradients of q, k and v for `d_out`, a function of (d_out, q, k, v): o and the rest follow from these."""

    @staticmethod
    def forward(
        d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, lost: Tensor, scale: float,
        chosen: str,
    ) -> Tensors:  # fmt: skip
        op = torch.ops.sagan_fast.attention_gradients
        return op(d_out, q, k, v, out, lse, lost, scale, chosen)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *tensors, ctx.scale, ctx.chosen = inputs
        _keep(ctx, *tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        saved = ctx.saved_tensors
        if not is_old_batch(*grads):
            found = Second.apply(*saved, *grads, ctx.scale, ctx.chosen)  # type: ignore[no-untyped-call]
        elif torch.is_grad_enabled():
            found = _second_plain(ctx.scale)(*saved[:4], *grads)
        else:
            found = torch.ops.sagan_fast.attention_second(*saved, *grads, ctx.scale, ctx.chosen)
        return (*found, *(None,) * 5)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        d_out, *others = saved = ctx.saved_tensors
        t_d_out, *given = _zeros_for(tangents[:4], saved[:4])
        second = Second.apply(*saved, *given, ctx.scale, ctx.chosen)[1:]  # type: ignore[no-untyped-call]
        first = Gradients.apply(t_d_out, *others, ctx.scale, ctx.chosen)  # type: ignore[no-untyped-call]
        return tuple(a + b for a, b in zip(first, second, strict=True))


class Tangent(_Function):
    """The tangent of o for the tangents of q, k and v."""

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, lost: Tensor, t_q: Tensor, t_k: Tensor,
        t_v: Tensor, scale: float, chosen: str,
    ) -> Tensor:  # fmt: skip
        op = torch.ops.sagan_fast.attention_tangent
        return op(q, k, v, out, lse, lost, t_q, t_k, t_v, scale, chosen)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *tensors, ctx.scale, ctx.chosen = inputs
        _keep(ctx, *tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        saved, tangents = ctx.saved_tensors[:6], ctx.saved_tensors[6:]
        _, *second = Second.apply(grads[0], *saved, *tangents, ctx.scale, ctx.chosen)  # type: ignore[no-untyped-call]
        first = Gradients.apply(grads[0], *saved, ctx.scale, ctx.chosen)  # type: ignore[no-untyped-call]
        return (*second, None, None, None, *first, None, None)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        of_inputs = (*tangents[:3], *tangents[6:9])
        inputs = (*ctx.saved_tensors[:3], *ctx.saved_tensors[6:])
        plain = functools.partial(reference.attention_tangent, scale=ctx.scale)
        return torch.func.jvp(plain, inputs, _zeros_for(of_inputs, inputs))[1]


class Second(_Function):
    """The tangent of o, and the gradients of <d_out, tangent> for q, k and v."""

    @staticmethod
    def forward(
        d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, lost: Tensor, t_q: Tensor,
        t_k: Tensor, t_v: Tensor, scale: float, chosen: str,
    ) -> Tensors:  # fmt: skip
        op = torch.ops.sagan_fast.attention_second
        return op(d_out, q, k, v, out, lse, lost, t_q, t_k, t_v, scale, chosen)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *tensors, ctx.scale, _ = inputs
        _keep(ctx, *tensors[:4], *tensors[7:])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        d_out, q, k, v, *tangents = torch.func.vjp(_second_plain(ctx.scale), *ctx.saved_tensors)[1](grads)
        return (d_out, q, k, v, None, None, None, *tangents, None, None)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        given = _zeros_for((*tangents[:4], *tangents[7:10]), ctx.saved_tensors)
        return torch.func.jvp(_second_plain(ctx.scale), ctx.saved_tensors, given)[1]


def _second_plain(scale: float) -> Callable[..., Tensors]:
    return functools.partial(reference.attention_second, scale=scale)
