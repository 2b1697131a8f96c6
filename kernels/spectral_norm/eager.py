"""The launchers of this folder in plain PyTorch, for devices without Triton: same arguments, same layout of results.

Less work than a loop over `reference`: z = W v and t = Wᵀz by blocks of rows that fit a cache, so W comes from memory
once for both; sigma = |Wᵀu| without a third product; lengths and divisions of all vectors in a few grouped calls.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .tables import SMALLEST_NORM, column_groups, matrices_of, offsets

BLOCK_ELEMENTS = 2**19
"""Of W, read twice in a row: 2 MB, some cores' second-level cache and any third-level one."""


def matrix_of(weight: Tensor) -> Tensor:
    """Return a dense `weight` as a matrix (R, K), its columns in the order in which they are stored; never a copy."""
    return weight.as_strided(
        (weight.shape[0], weight.numel() // weight.shape[0]), (weight.numel() // weight.shape[0], 1)
    )


def as_stored(v: Tensor, weight: Tensor) -> Tensor:
    """Return `v` (K,) in the order in which the columns of `weight` are stored."""
    return v if column_groups(weight)[1] == 1 else _by_group(v, weight).reshape(-1)


def _by_group(v: Tensor, weight: Tensor) -> Tensor:
    """Return the view of `v` (K,) whose elements come in the order in which the columns of `weight` are stored."""
    C, S = column_groups(weight)
    return v if S == 1 else v.view(C, S).t()


def _by_axis(stored: Tensor, weight: Tensor) -> Tensor:
    """Return the view of `stored` (K,), in the order of memory, that has the shape of `_by_group` of a v."""
    C, S = column_groups(weight)
    return stored if S == 1 else stored.view(S, C)


def split_vector(flat: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Return the views of `flat` that hold vectors of `sizes`."""
    return [flat[start : start + size] for start, size in zip(offsets(sizes)[0], sizes, strict=True)]


def v_of(flat: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """Return every v (K,) of a flat tensor of them, in the order of the weights' axes."""
    found = []
    for v, weight in zip(split_vector(flat, [weight[0].numel() for weight in weights]), weights, strict=True):
        C, S = column_groups(weight)
        found.append(v if S == 1 else v.view(S, C).t().reshape(-1))
    return found


def spectral_norm_fwd(
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    *,
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    update: bool = True,
    v_first: bool = False,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    sigmas: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return flat W/sigma, sigmas (L,), flat copies of u and v: see `forward.spectral_norm_fwd`; also float64."""
    dtype = us[0].dtype
    if out is None:
        out = weights[0].new_empty(offsets([weight.numel() for weight in weights])[1], dtype=out_dtype)
    flat_u = us[0].new_empty(offsets([u.numel() for u in us])[1])
    flat_v = us[0].new_empty(offsets([v.numel() for v in vs])[1])
    new_us, new_vs = split_vector(flat_u, [u.numel() for u in us]), split_vector(flat_v, [v.numel() for v in vs])
    matrices = [matrix_of(weight).to(dtype) for weight in weights]
    # u and v, and what becomes of them, as views of equal shapes
    kept = [*us, *map(_by_group, vs, weights)]
    moved = [*new_us, *map(_by_axis, new_vs, weights)]
    torch._foreach_copy_(moved, kept)
    if update:
        given, ends = (new_us, (new_vs, new_us)) if v_first else (new_vs, (new_us, new_vs))
        sides = [matrix.t() for matrix in matrices] if v_first else matrices
        for _ in range(n_power_iterations):
            norms, found = _update(sides, given, *ends, eps)
        sigmas = torch.stack(found)
        _copy_where(_are_lengths(torch.stack(norms), sigmas), kept, moved)
    elif sigmas is not None:
        sigmas = sigmas.to(dtype)
        found = list(sigmas)
    else:
        found = [torch.dot(u, torch.mv(matrix, v)) for matrix, u, v in zip(matrices, new_us, new_vs, strict=True)]
        sigmas = torch.stack(found)
    for start, matrix, sigma in zip(offsets([matrix.numel() for matrix in matrices])[0], matrices, found, strict=True):
        place = out[start : start + matrix.numel()].view(matrix.shape)
        if place.dtype == dtype:
            torch.div(matrix, sigma, out=place)
        else:
            place.copy_(matrix / sigma)
    return out, sigmas, flat_u, flat_v


def _update(
    matrices: Sequence[Tensor], given: Sequence[Tensor], firsts: list[Tensor], seconds: list[Tensor], eps: float
) -> tuple[list[Tensor], list[Tensor]]:
    """Set first = M given / |.|, then second = Mᵀ first / |.| for every matrix M; `given` may be `seconds`.

    Return every |M given|, and sigma = firstᵀ M second.
    """
    for matrix, start, first, second in zip(matrices, given, firsts, seconds, strict=True):
        rows = max(1, BLOCK_ELEMENTS // matrix.shape[1])
        if rows >= matrix.shape[0] or not matrix.is_contiguous():
            torch.mv(matrix, start, out=first)
            torch.mv(matrix.t(), first, out=second)
            continue
        total = torch.zeros_like(second)
        for block, part in zip(matrix.split(rows), first.split(rows), strict=True):
            torch.mv(block, start, out=part)
            total.addmv_(block.t(), part)
        second.copy_(total)
    norms = torch._foreach_norm(firsts)
    lengths = torch._foreach_clamp_min(norms, eps)
    torch._foreach_div_(firsts, lengths)
    torch._foreach_div_(seconds, lengths)
    lengths = torch._foreach_norm(seconds)
    floors = torch._foreach_clamp_min(lengths, eps)
    torch._foreach_div_(seconds, floors)
    return list(norms), list(torch._foreach_div(torch._foreach_mul(lengths, lengths), floors))


def spectral_norms(
    tensors: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    *,
    n_power_iterations: int = 1,
    v_first: bool = False,
    update: bool = True,
    eps: float = 1e-12,
) -> Tensor:
    """Return sigmas (L,) of all matrices: see `norms.spectral_norms`; also float64."""
    are_stacks = [u.ndim == 2 for u in us]
    weights, us, vs = (
        [one for each, is_stack in zip(some, are_stacks, strict=True) for one in matrices_of(each, is_stack)]
        for some in (tensors, us, vs)
    )
    dtype = us[0].dtype
    stored_vs = [as_stored(v, weight) for v, weight in zip(vs, weights, strict=True)]
    # One at a time where they have to be converted: all in float32 at once would be a copy of everything.
    every = range(len(weights))
    sigmas = []
    for group in [every] if weights[0].dtype == dtype else [[i] for i in every]:
        matrices = [matrix_of(weights[i]).to(dtype) for i in group]
        ends = [us[i] for i in group], [stored_vs[i] for i in group]
        if not update:
            sigmas += [torch.dot(u, torch.mv(matrix, v)) for matrix, u, v in zip(matrices, *ends, strict=True)]
            continue
        if v_first:
            matrices, ends = [matrix.t() for matrix in matrices], ends[::-1]
        for _ in range(n_power_iterations):
            found = _move(matrices, *ends, eps)
        sigmas += found
    if update:
        for v, stored, weight in zip(vs, stored_vs, weights, strict=True):
            if stored.data_ptr() != v.data_ptr():
                v.copy_(v_of(stored, [weight])[0])
    return torch.stack(sigmas)


def _move(matrices: list[Tensor], firsts: list[Tensor], seconds: list[Tensor], eps: float) -> list[Tensor]:
    """Do as `_update`, but leave both vectors where a length is not `is_scalable`; return that length, else sigma."""
    moved = [torch.empty_like(end) for end in firsts], [torch.empty_like(end) for end in seconds]
    norms, sigmas = map(torch.stack, _update(matrices, seconds, *moved, eps))
    is_first_long = is_scalable(norms)
    _copy_where(is_first_long & is_scalable(sigmas), [*firsts, *seconds], [*moved[0], *moved[1]])
    return list(torch.where(is_first_long, sigmas, norms))


def _copy_where(moves: Tensor | list[bool], ends: Sequence[Tensor], moved: Sequence[Tensor]) -> None:
    """Copy the vectors `moved` to `ends`, every u and then every v, of those matrices for which `moves` (L,) is true.

    For a list of `moves` nothing is asked of the device.
    """
    if isinstance(moves, Tensor) and moves.device.type != "cpu":  # where asking which would wait for the device
        for end, one, is_moving in zip(ends, moved, (*moves, *moves), strict=True):
            end.copy_(torch.where(is_moving, one, end))
        return
    which = moves.tolist() if isinstance(moves, Tensor) else moves
    wanted = [i for i, is_moving in enumerate((*which, *which)) if is_moving]
    if wanted:
        torch._foreach_copy_([ends[i] for i in wanted], [moved[i] for i in wanted])


def scale_spectral_norms(
    tensors: Sequence[Tensor], are_stacks: Sequence[bool], sigmas: Tensor, targets: Tensor | float
) -> None:
    """Multiply every matrix in place: see `norms.scale_spectral_norms`; also tensors of any strides."""
    factors = torch.where(is_scalable(sigmas), targets / sigmas, 1.0)
    sizes = [tensor.shape[0] if is_stack else 1 for tensor, is_stack in zip(tensors, are_stacks, strict=True)]
    for tensor, is_stack, factor in zip(tensors, are_stacks, factors.split(sizes), strict=True):
        tensor.mul_(factor.view(-1, *[1] * (tensor.ndim - 1)) if is_stack else factor[0])


def is_scalable(sigmas: Tensor) -> Tensor:
    """Return which of `sigmas` are finite and not below `SMALLEST_NORM`."""
    return (sigmas >= SMALLEST_NORM) & sigmas.isfinite()


def _are_lengths(norms: Tensor, sigmas: Tensor) -> Tensor | list[bool]:
    """Return for which matrices both are finite and above 0, so that both vectors have a direction."""
    if norms.device.type != "cpu":
        return (norms > 0) & norms.isfinite() & (sigmas > 0) & sigmas.isfinite()
    lengths = zip(norms.tolist(), sigmas.tolist(), strict=True)
    return [0 < norm < math.inf and 0 < sigma < math.inf for norm, sigma in lengths]


def spectral_norm_bwd(
    grads: Sequence[Tensor | None], weights: Sequence[Tensor], sigmas: Tensor, u: Tensor, v: Tensor
) -> Tensor:
    """Return flat dW of the weights' dtype: see `backward.spectral_norm_bwd`; also float64."""
    starts, size = offsets([weight.numel() for weight in weights])
    d_weight = weights[0].new_empty(size)
    us = split_vector(u, [weight.shape[0] for weight in weights])
    vs = split_vector(v, [weight[0].numel() for weight in weights])
    is_asked = u.device.type == "cpu"  # for its numbers; any other device would be waited for
    factors = sigmas.reciprocal().tolist() if is_asked else []
    for i, (grad, weight) in enumerate(zip(grads, weights, strict=True)):
        if grad is None:
            continue
        stored = grad if grad.stride() == weight.stride() else torch.empty_like(weight, dtype=grad.dtype).copy_(grad)
        g, matrix, sigma = matrix_of(stored), matrix_of(weight), sigmas[i]
        place = d_weight[starts[i] : starts[i] + weight.numel()].view(g.shape)
        if is_asked and g.dtype == matrix.dtype == u.dtype:  # three passes, no memory but the result's
            share = torch.mul(g, matrix, out=place).sum() / (sigma * sigma)
            torch.addr(g, us[i], vs[i], beta=factors[i], alpha=-share.item(), out=place)
            continue
        g = g.to(u.dtype)
        share = torch.sum(g * matrix) / (sigma * sigma)
        place.copy_(torch.addr(g / sigma, us[i] * -share, vs[i]))
    return d_weight
