"""Spectral norms of a list of matrices, and the matrices scaled to given ones, without autograd: for optimizers.

One power iteration a step on the update of each weight, with u and v kept from step to step, follows the largest
singular value as spectral norm does for weights (Miyato et al. 2018, algorithm 1). Everything is computed in float32
(float64 for float64 tensors).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sagan_fast.kernels.launch import accumulator_dtype
from sagan_fast.kernels.spectral_norm import eager
from sagan_fast.kernels.spectral_norm.tables import first_of, is_capturing, is_dense_stack
from sagan_fast.ops.backends import choose_spectral_norm
from sagan_fast.ops.spectral_norm import batches

_OP, _SCALE_OP = "spectral_norms", "scale_spectral_norms_"


@torch.no_grad()
def spectral_norms(
    tensors: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    *,
    n_power_iterations: int = 1,
    v_first: bool = False,
    update: bool = True,
    backend: str = "auto",
) -> list[Tensor]:
    """Return sigma = uᵀXv of each of `tensors`: float32, of shape () for a matrix and (E,) for a stack of E matrices.

    A tensor (R, ...) with u (R,) and v (K,) is the matrix (R, K); a tensor (E, R, ...) with u (E, R) and v (E, K) is a
    stack of them, such as the experts of a layer. With `update`, `us` and `vs` are first updated in place by
    `n_power_iterations`: u = Xv/|Xv|, then v = Xᵀu/|Xᵀu|, with `v_first` v before u. The tensors are only read, and may
    be others at every call. u and v start as random vectors of length 1 and should be kept from call to call.

    A matrix of zeros is safe: where |Xv| (with `v_first` |Xᵀu|) is below 1e-6 or not finite, u and v stay as they are,
    and sigma is that norm. The result has no gradient.

    `backend`: "triton" on CUDA takes all tensors of a dtype in three launches an iteration, also while a CUDA graph is
    captured, if a list of these shapes was seen before; "eager" is plain PyTorch; "auto" is "triton" on CUDA and
    "eager" elsewhere. Raises ValueError for shapes that do not fit, TypeError for other dtypes than floats,
    RuntimeError if "triton" is asked for where it cannot run.
    """
    _check(tensors, us, vs, n_power_iterations)
    sigmas: dict[int, Tensor] = {}
    are_stacks = [u.ndim == 2 for u in us]
    matrices = [first_of(tensor, is_stack) for tensor, is_stack in zip(tensors, are_stacks, strict=True)]
    for indices in batches(matrices):
        chosen = choose_spectral_norm(_OP, backend, [matrices[i] for i in indices]).backend
        some = [tensors[i] if is_dense_stack(tensors[i], are_stacks[i]) else tensors[i].contiguous() for i in indices]
        vectors = [us[i] for i in indices], [vs[i] for i in indices]
        found = _norms_op if torch.compiler.is_compiling() else _norms
        flat = found([tensor.detach() for tensor in some], *vectors, chosen, n_power_iterations, v_first, update)
        counts = [tensors[i].shape[0] if are_stacks[i] else 1 for i in indices]
        for i, sigma in zip(indices, flat.split(counts), strict=True):
            sigmas[i] = sigma if are_stacks[i] else sigma[0]
    return [sigmas[i] for i in range(len(tensors))]


@torch.no_grad()
def scale_spectral_norms_(
    tensors: Sequence[Tensor],
    sigmas: Sequence[Tensor],
    targets: float | Sequence[float] | Tensor = 1.0,
    *,
    backend: str = "auto",
) -> None:
    """Multiply each of `tensors` in place by target / sigma, so that its spectral norm is its target.

    `sigmas` as `spectral_norms` returns them, with those of the stacks' matrices in (E,). `targets`: one number, one a
    tensor, or a tensor of either on the same device. Each element is read and written once. A matrix whose sigma is
    below 1e-6 or not finite stays as it is.

    `backend` as in `spectral_norms`. While a CUDA graph is captured, give one number, or a tensor, whose values a
    replay reads anew. Raises ValueError for numbers of sigmas or targets that do not fit, TypeError for other dtypes
    than floats, RuntimeError if "triton" is asked for where it cannot run.
    """
    _check_scaling(tensors, sigmas, targets)
    are_stacks = [sigma.ndim == 1 for sigma in sigmas]
    matrices = [first_of(tensor, is_stack) for tensor, is_stack in zip(tensors, are_stacks, strict=True)]
    for indices in batches(matrices):
        chosen = choose_spectral_norm(_SCALE_OP, backend, [matrices[i] for i in indices]).backend
        some, stacks = [tensors[i] for i in indices], [are_stacks[i] for i in indices]
        dtype, device = accumulator_dtype(some[0].dtype), some[0].device
        flat = torch.cat([sigmas[i].reshape(-1) for i in indices]).to(dtype)
        counts = [sigmas[i].numel() for i in indices]
        target, each = 1.0, None
        if isinstance(targets, (int, float)):
            target = float(targets)
        else:
            values = (targets if isinstance(targets, Tensor) else _uploaded(targets, device)).reshape(-1)
            # Views, not an index: an index would be uploaded.
            chosen_values = [
                values[i if values.numel() > 1 else 0].expand(n) for i, n in zip(indices, counts, strict=True)
            ]
            each = torch.cat(chosen_values).to(device, dtype)
        (_scale_op if torch.compiler.is_compiling() else _scale)(some, stacks, flat, each, target, chosen)


def _uploaded(targets: Sequence[float], device: torch.device) -> Tensor:
    if is_capturing(device):
        raise RuntimeError(
            f"{_SCALE_OP}: targets must be one number or a tensor while a CUDA graph is captured, got numbers that "
            "would have to be uploaded"
        )
    return torch.tensor(targets, dtype=torch.float64).to(device)


def _norms(
    tensors: list[Tensor],
    us: list[Tensor],
    vs: list[Tensor],
    backend: str,
    n_power_iterations: int,
    v_first: bool,
    update: bool,
) -> Tensor:
    dtype = accumulator_dtype(tensors[0].dtype)
    exact = [[x.to(dtype).contiguous() for x in vectors] for vectors in (us, vs)]
    launcher = eager.spectral_norms
    if backend == "triton":
        from sagan_fast.kernels.spectral_norm import norms

        launcher = norms.spectral_norms
    found = launcher(tensors, *exact, n_power_iterations=n_power_iterations, v_first=v_first, update=update)
    for given, moved in zip((*us, *vs), (*exact[0], *exact[1]), strict=True):
        if update and given is not moved:
            given.copy_(moved)
        elif update and backend == "triton":  # which writes without PyTorch's knowledge
            torch.autograd.graph.increment_version(given)
    return found


def _scale(
    tensors: list[Tensor], are_stacks: list[bool], sigmas: Tensor, targets: Tensor | None, target: float, backend: str
) -> None:
    wanted = target if targets is None else targets
    dense = [is_dense_stack(tensor, is_stack) for tensor, is_stack in zip(tensors, are_stacks, strict=True)]
    if backend != "triton":
        eager.scale_spectral_norms(tensors, are_stacks, sigmas, wanted)
        return
    from sagan_fast.kernels.spectral_norm import norms

    # What does not lie row after row is copied, scaled and copied back.
    some = [tensor if is_dense else tensor.contiguous() for tensor, is_dense in zip(tensors, dense, strict=True)]
    norms.scale_spectral_norms([tensor.detach() for tensor in some], are_stacks, sigmas, wanted)
    for tensor, scaled, is_dense in zip(tensors, some, dense, strict=True):
        if is_dense:
            torch.autograd.graph.increment_version(tensor)
        else:
            tensor.copy_(scaled)


@torch.library.custom_op("sagan_fast::spectral_norms", mutates_args=("us", "vs"))
def _norms_op(
    tensors: list[Tensor],
    us: list[Tensor],
    vs: list[Tensor],
    backend: str,
    n_power_iterations: int,
    v_first: bool,
    update: bool,
) -> Tensor:
    return _norms(tensors, us, vs, backend, n_power_iterations, v_first, update)


@_norms_op.register_fake
def _(
    tensors: list[Tensor], us: list[Tensor], vs: list[Tensor], backend: str, n: int, v_first: bool, update: bool
) -> Tensor:
    count = sum(u.shape[0] if u.ndim == 2 else 1 for u in us)
    return tensors[0].new_empty(count, dtype=accumulator_dtype(tensors[0].dtype))


@torch.library.custom_op("sagan_fast::scale_spectral_norms_", mutates_args=("tensors",))
def _scale_op(
    tensors: list[Tensor], are_stacks: list[bool], sigmas: Tensor, targets: Tensor | None, target: float, backend: str
) -> None:
    _scale(tensors, are_stacks, sigmas, targets, target, backend)


@_scale_op.register_fake
def _(
    tensors: list[Tensor], are_stacks: list[bool], sigmas: Tensor, targets: Tensor | None, target: float, backend: str
) -> None:
    pass


def _check(tensors: Sequence[Tensor], us: Sequence[Tensor], vs: Sequence[Tensor], n_power_iterations: int) -> None:
    if not len(tensors) == len(us) == len(vs):
        raise ValueError(
            f"{_OP}: us and vs must have the length of tensors, {len(tensors)}, got {len(us)} and {len(vs)}"
        )
    if n_power_iterations < 1:
        raise ValueError(f"{_OP}: n_power_iterations must be at least 1, got {n_power_iterations}")
    for i, (tensor, u, v) in enumerate(zip(tensors, us, vs, strict=True)):
        _check_tensor(_OP, i, tensor, u.ndim == 2)
        leading = tensor.shape[: u.ndim]
        sizes = tuple(leading), (*leading[:-1], tensor.numel() // leading.numel())
        if (tuple(u.shape), tuple(v.shape)) != sizes:
            letters = "(E, R) and (E, K)" if u.ndim == 2 else "(R,) and (K,)"
            raise ValueError(
                f"{_OP}: us[{i}] and vs[{i}] must have shapes {letters} = {sizes[0]} and {sizes[1]}, "
                f"got {tuple(u.shape)} and {tuple(v.shape)}"
            )
        if not (u.device == v.device == tensor.device):
            devices = f"{u.device} and {v.device}"
            raise ValueError(f"{_OP}: us[{i}] and vs[{i}] must be on the device of its tensor, got {devices}")


def _check_scaling(tensors: Sequence[Tensor], sigmas: Sequence[Tensor], targets: object) -> None:
    if len(tensors) != len(sigmas):
        raise ValueError(f"{_SCALE_OP}: sigmas must have the length of tensors, {len(tensors)}, got {len(sigmas)}")
    for i, (tensor, sigma) in enumerate(zip(tensors, sigmas, strict=True)):
        _check_tensor(_SCALE_OP, i, tensor, sigma.ndim == 1)
        if sigma.ndim > 1 or (sigma.ndim == 1 and len(sigma) != tensor.shape[0]):
            expected = f"() for a matrix or (E,) = ({tensor.shape[0]},) for a stack"
            raise ValueError(f"{_SCALE_OP}: sigmas[{i}] must have shape {expected}, got {tuple(sigma.shape)}")
    if not isinstance(targets, (int, float)):
        count = targets.numel() if isinstance(targets, Tensor) else len(targets)  # type: ignore[arg-type]
        if count != len(tensors) and not (isinstance(targets, Tensor) and count == 1):
            raise ValueError(f"{_SCALE_OP}: targets must be one number or one a tensor, {len(tensors)}, got {count}")


def _check_tensor(op: str, i: int, tensor: Tensor, is_stack: bool) -> None:
    if not tensor.is_floating_point():
        raise TypeError(f"{op}: tensors[{i}] must have a floating-point dtype, got {tensor.dtype}")
    if tensor.ndim < 2 + is_stack or not tensor.numel():
        what = "matrices with rows and columns" if is_stack else "rows and columns"
        raise ValueError(f"{op}: tensors[{i}] must have {what}, got shape {tuple(tensor.shape)}")
