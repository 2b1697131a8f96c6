"""W/sigma for a list of weights at once, with the power iteration of spectral norm: backends, autograd, custom ops.

Miyato et al. 2018, algorithm 1. u and v are constants in the gradient: dW = (G - <G, W/sigma> u vᵀ)/sigma. Everything
is computed in float32 (float64 for float64 weights), also under autocast.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sagan_fast.kernels.launch import accumulator_dtype
from sagan_fast.kernels.spectral_norm import eager, reference
from sagan_fast.kernels.spectral_norm.tables import is_dense, offsets
from sagan_fast.ops.backends import choose_spectral_norm, too_large
from sagan_fast.ops.derivatives import is_old_batch
from sagan_fast.ops.library import is_transformed

_OP = "spectral_norm_group"


def spectral_norm_group(
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    *,
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    update: bool = True,
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> list[Tensor]:
    """Return W/sigma for each of `weights`, with the shape of the weight and `out_dtype` (by default its own dtype).

    A weight (R, ...) is taken as the matrix (R, K); `us` (R,) and `vs` (K,) are updated in place by
    `n_power_iterations` when `update`, in the order of `torch.nn.utils.parametrizations.spectral_norm`, and are
    constants in the gradient. No length is taken below `eps`. A weight of zeros gives NaN, as in torch, but u and v
    stay, as for weights that are not finite: the next good weight is normalised as if nothing had happened.

    `backend`: "triton" on CUDA takes all weights in three launches, their gradient in two; "eager" is plain PyTorch;
    "auto" is "triton" on CUDA and "eager" elsewhere. Under `torch.func`, forward-mode AD and torch.export every backend
    computes W/sigma in plain PyTorch, with u and v as they are and no iteration.

    Raises ValueError for shapes that do not fit, TypeError for other dtypes than floats, RuntimeError if "triton" is
    asked for where it cannot run, or `update` under a transform, where nothing can be written in place.
    """
    _check(weights, us, vs, n_power_iterations)
    if is_transformed() or torch.compiler.is_exporting():  # which would lose the gradients of a Function
        if update and is_transformed():
            raise RuntimeError(f"{_OP}: update must be False under torch.func and forward-mode AD, got True")
        return [_plain(weight, u, v, out_dtype) for weight, u, v in zip(weights, us, vs, strict=True)]
    outs: dict[int, Tensor] = {}
    for indices in batches(weights):
        chosen = choose_spectral_norm(_OP, backend, [weights[i] for i in indices]).backend
        some = _SpectralNormFunction.apply(
            n_power_iterations, eps, update, out_dtype or weights[indices[0]].dtype, chosen, len(indices),
            *[weights[i] if is_dense(weights[i]) else weights[i].contiguous() for i in indices],
            *[us[i] for i in indices],
            *[vs[i] for i in indices],
        )  # fmt: skip
        outs.update(zip(indices, some, strict=True))
    return [outs[i] for i in range(len(weights))]


def _plain(weight: Tensor, u: Tensor, v: Tensor, out_dtype: torch.dtype | None) -> Tensor:
    matrix = weight.flatten(1).to(accumulator_dtype(weight.dtype))
    out, _ = reference.normalise(matrix, u.to(matrix.dtype), v.to(matrix.dtype))
    return out.view(weight.shape).to(out_dtype or weight.dtype)


def _plain_gradient(grad: Tensor, weight: Tensor, u: Tensor, v: Tensor, sigma: Tensor) -> Tensor:
    rows = (weight.shape[0], -1)  # PyTorch's old vmap has no flatten
    grad, matrix = (x.to(u.dtype).reshape(rows) for x in (grad, weight))
    d_weight = reference.normalise_backward(grad, matrix, u, v, sigma)
    return d_weight.reshape(weight.shape).to(weight.dtype)


def batches(weights: Sequence[Tensor]) -> list[list[int]]:
    """Return the indices of `weights`, those together that one backend can take in one pass."""
    found: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for index, weight in enumerate(weights):
        found[weight.device, weight.dtype, too_large(weight)].append(index)
    return list(found.values())


@torch.library.custom_op("sagan_fast::spectral_norm_fwd", mutates_args=("us", "vs"))
def _forward_op(
    weights: list[Tensor],
    us: list[Tensor],
    vs: list[Tensor],
    n_power_iterations: int,
    eps: float,
    update: bool,
    out_dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return forward_all(
        backend, weights, us, vs, n_power_iterations=n_power_iterations, eps=eps, update=update, out_dtype=out_dtype
    )


@_forward_op.register_fake
def _(
    weights: list[Tensor], us: list[Tensor], vs: list[Tensor], n: int, eps: float, update: bool, out_dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    first, dtype = weights[0], accumulator_dtype(weights[0].dtype)
    return (
        first.new_empty(offsets([weight.numel() for weight in weights])[1], dtype=out_dtype),
        first.new_empty(len(weights), dtype=dtype),
        first.new_empty(offsets([u.numel() for u in us])[1], dtype=dtype),
        first.new_empty(offsets([v.numel() for v in vs])[1], dtype=dtype),
    )


@torch.library.custom_op("sagan_fast::spectral_norm_bwd", mutates_args=())
def _backward_op(
    grads: list[Tensor | None], weights: list[Tensor], sigmas: Tensor, u: Tensor, v: Tensor, backend: str
) -> Tensor:
    if backend == "triton":
        from sagan_fast.kernels.spectral_norm.backward import spectral_norm_bwd

        return spectral_norm_bwd(grads, weights, sigmas, u, v)
    return eager.spectral_norm_bwd(grads, weights, sigmas, u, v)


@_backward_op.register_fake
def _(grads: list[Tensor | None], weights: list[Tensor], sigmas: Tensor, u: Tensor, v: Tensor, backend: str) -> Tensor:
    return weights[0].new_empty(offsets([weight.numel() for weight in weights])[1])


def forward_all(
    backend: str, weights: Sequence[Tensor], us: Sequence[Tensor], vs: Sequence[Tensor], *, update: bool, **options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return flat W/sigma, sigmas (L,), and flat copies of u and v, which are updated in place; no autograd.

    `weights` are dense and of one device and dtype, `us` and `vs` of any dtype. `options` are those of the kernels'
    `spectral_norm_fwd`: the settings, an earlier `out` to write again, `sigmas` to take instead of computing them.
    """
    dtype = accumulator_dtype(weights[0].dtype)
    exact_us, exact_vs = ([x.to(dtype).contiguous() for x in vectors] for vectors in (us, vs))
    launcher: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]] = eager.spectral_norm_fwd
    if backend == "triton":
        from sagan_fast.kernels.spectral_norm.forward import spectral_norm_fwd

        launcher = spectral_norm_fwd
    flat, sigmas, u, v = launcher([weight.detach() for weight in weights], exact_us, exact_vs, update=update, **options)
    for given, exact in zip((*us, *vs), (*exact_us, *exact_vs), strict=True):
        if update and given is not exact:
            given.copy_(exact)
    return flat, sigmas, u, v


def split(flat: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """Return the views of `flat` that have the shapes and strides of `weights`."""
    starts, _ = offsets([weight.numel() for weight in weights])
    return [
        flat[start : start + weight.numel()].as_strided(weight.shape, weight.stride())
        for start, weight in zip(starts, weights, strict=True)
    ]


class _SpectralNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, n_power_iterations: int, eps: float, update: bool, out_dtype: torch.dtype, backend: str, count: int,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        weights, us, vs = (list(tensors[i * count : (i + 1) * count]) for i in range(3))
        out, sigmas, u, v = _forward_op(weights, us, vs, n_power_iterations, eps, update, out_dtype, backend)
        ctx.save_for_backward(sigmas, u, v, *weights)
        ctx.backend, ctx.count = backend, count
        ctx.set_materialize_grads(False)
        return tuple(split(out, weights))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        sigmas, u, v, *weights = ctx.saved_tensors
        wanted = [grad if needed else None for grad, needed in zip(grads, ctx.needs_input_grad[6:], strict=False)]
        d_weights = gradient(ctx.backend, sigmas, u, v, wanted, weights)
        return (*(None,) * 6, *d_weights, *(None,) * (2 * ctx.count))


def gradient(
    backend: str, sigmas: Tensor, u: Tensor, v: Tensor, grads: Sequence[Tensor | None], weights: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """Return dW for every grad of W/sigma that is not None; differentiable in the grads and the weights."""
    if all(grad is None for grad in grads):
        return (None,) * len(grads)
    compiling = torch.compiler.is_compiling()
    if not compiling and (is_transformed() or is_old_batch(*(grad for grad in grads if grad is not None))):
        parts = zip(eager.split_vector(u, [w.shape[0] for w in weights]), eager.v_of(v, weights), sigmas, strict=True)
        return tuple(
            None if grad is None else _plain_gradient(grad, weight, *part)
            for grad, weight, part in zip(grads, weights, parts, strict=True)
        )
    if compiling:  # no double backward there, and 2.11 traces no Function inside a backward
        return _gradients(backend, sigmas, u, v, grads, weights)
    out: tuple[Tensor | None, ...] = _GradientFunction.apply(backend, sigmas, u, v, len(weights), *grads, *weights)
    return out


def _gradients(
    backend: str, sigmas: Tensor, u: Tensor, v: Tensor, grads: Sequence[Tensor | None], weights: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    flat = _backward_op(list(grads), list(weights), sigmas, u, v, backend)
    return tuple(None if grad is None else d_weight for grad, d_weight in zip(grads, split(flat, weights), strict=True))


class _GradientFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, backend: str, sigmas: Tensor, u: Tensor, v: Tensor, count: int, *tensors: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        grads, weights = list(tensors[:count]), [tensor for tensor in tensors[count:] if tensor is not None]
        ctx.save_for_backward(u, v, *tensors)
        ctx.count = count
        ctx.set_materialize_grads(False)
        return _gradients(backend, sigmas, u, v, grads, weights)

    @staticmethod
    def backward(ctx: Any, *grad_grads: Tensor | None) -> tuple[Tensor | None, ...]:
        u, v, *tensors = ctx.saved_tensors
        count = ctx.count
        grads, weights = tensors[:count], tensors[count:]
        found: list[Tensor | None] = [None] * (2 * count)
        create_graph = torch.is_grad_enabled()
        parts = zip(eager.split_vector(u, [w.shape[0] for w in weights]), eager.v_of(v, weights), strict=True)
        for i, (u_i, v_i) in enumerate(parts):
            grad_grad, grad, weight = grad_grads[i], grads[i], weights[i]
            if grad_grad is None or grad is None:
                continue
            with torch.enable_grad(), torch.autocast(weight.device.type, enabled=False):
                # Views, so that the derivative stops here and yet is connected to what grad and weight came from.
                grad, weight = (
                    x.view_as(x) if x.requires_grad else x.detach().requires_grad_() for x in (grad, weight)
                )
                matrix = weight.flatten(1).to(u.dtype)
                _, sigma = reference.normalise(matrix, u_i, v_i)
                d_weight = reference.normalise_backward(grad.flatten(1).to(u.dtype), matrix, u_i, v_i, sigma)
                found[i], found[count + i] = torch.autograd.grad(
                    d_weight.view(weight.shape).to(weight.dtype), (grad, weight), grad_grad, create_graph=create_graph
                )
        return (*(None,) * 5, *found)


def _check(weights: Sequence[Tensor], us: Sequence[Tensor], vs: Sequence[Tensor], n_power_iterations: int) -> None:
    if not len(weights) == len(us) == len(vs):
        raise ValueError(
            f"{_OP}: us and vs must have the length of weights, {len(weights)}, got {len(us)} and {len(vs)}"
        )
    if n_power_iterations < 1:
        raise ValueError(f"{_OP}: n_power_iterations must be at least 1, got {n_power_iterations}")
    for i, (weight, u, v) in enumerate(zip(weights, us, vs, strict=True)):
        if not weight.is_floating_point():
            raise TypeError(f"{_OP}: weights[{i}] must have a floating-point dtype, got {weight.dtype}")
        if weight.ndim < 2 or not weight.numel():
            raise ValueError(f"{_OP}: weights[{i}] must have rows and columns, got shape {tuple(weight.shape)}")
        sizes = (weight.shape[0],), (weight.numel() // weight.shape[0],)
        if (tuple(u.shape), tuple(v.shape)) != sizes:
            raise ValueError(
                f"{_OP}: us[{i}] and vs[{i}] must have shapes (R,) and (K,) = {sizes[0]} and {sizes[1]}, "
                f"got {tuple(u.shape)} and {tuple(v.shape)}"
            )
