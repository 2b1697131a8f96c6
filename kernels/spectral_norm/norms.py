"""sigma of every matrix of a list after a power iteration, without W/sigma, and the matrices scaled in place.

For the updates of an optimizer: the list holds other tensors at every step, u and v persist, an update may be zero.
Sweep and reduce are those of forward.py. The reduce leaves the lengths of the first vectors; `_finish_kernel` then
moves u and v, or leaves both where a length is below SMALLEST_NORM or not finite. `_rescale_kernel` reads and writes
each element once. Grids: finish, a program for each chunk of the second vector; rescale, one for each chunk of W.
Oracle: `reference.norm_of_update`.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import FLOAT_DTYPES, check_contiguous, check_dtype, check_same_device, check_shape
from ..launch import Launch, Needs, launch
from ..tiles import triton_dtype
from .forward import launch_reduce, scale_chunk
from .stacks import Stacked, stacked_addresses, stacked_tables
from .sweep import (
    _C,
    _CHUNKS,
    _FIELDS,
    _FLAT_ALIGNED,
    _K,
    _MAX_CHUNKS,
    _OFFSET_UNIT,
    _R,
    _S,
    _T,
    _U,
    _V,
    _W,
    _Z,
    Buffers,
    _length,
    launch_sweep,
    name_of,
)
from .tables import MAX_CHUNKS, SMALLEST_NORM, first_of, is_dense_stack, refusal_of

_SMALLEST = tl.constexpr(SMALLEST_NORM)


@triton.jit
def _is_scalable(norm):
    return (norm >= _SMALLEST) & (norm < float("inf"))


@triton.jit
def _finish_kernel(
    matrices_ptr, addresses_ptr, items_ptr,  # (L, FIELDS) int64, (L, 3) int64, (programs, 2) int32
    sigma_ptr, firsts_ptr,  # (L,), (L,)
    z_ptr, t_ptr, norms_ptr,  # as the reduce left them
    eps,
    V_FIRST: tl.constexpr, UPDATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Store sigma, and with UPDATE u and v."""
    matrix = tl.load(items_ptr + tl.program_id(0) * 2)
    chunk = tl.load(items_ptr + tl.program_id(0) * 2 + 1)
    entry_ptr = matrices_ptr + matrix * _FIELDS
    chunks = tl.load(entry_ptr + _CHUNKS).to(tl.int32)
    if UPDATE:
        first = tl.load(firsts_ptr + matrix)
        length, sigma = _length(norms_ptr, matrix, chunks, eps)
        moves = _is_scalable(first) & _is_scalable(sigma)
        if chunk == 0:
            tl.store(sigma_ptr + matrix, tl.where(_is_scalable(first), sigma, first))
        if moves:
            R = tl.load(entry_ptr + _R).to(tl.int32)
            K = tl.load(entry_ptr + _K).to(tl.int32)
            C = tl.load(entry_ptr + _C).to(tl.int32)
            S = tl.load(entry_ptr + _S).to(tl.int32)
            z_ptr += tl.load(entry_ptr + _Z) * _OFFSET_UNIT
            t_ptr += tl.load(entry_ptr + _T) * _OFFSET_UNIT
            u_ptr = tl.load(addresses_ptr + matrix * 3 + _U).to(tl.pointer_type(tl.float32))
            v_ptr = tl.load(addresses_ptr + matrix * 3 + _V).to(tl.pointer_type(tl.float32))
            z_length, t_length = first, length
            if V_FIRST:
                z_length, t_length = length, first
            offs = tl.arange(0, BLOCK)
            for start in range(chunk * BLOCK, R, chunks * BLOCK):
                index = start + offs
                u = tl.load(z_ptr + index, mask=index < R, other=0.0) / z_length
                tl.store(u_ptr + index, u, mask=index < R)
            for start in range(chunk * BLOCK, K, chunks * BLOCK):
                index = start + offs
                v = tl.load(t_ptr + index, mask=index < K, other=0.0) / t_length
                tl.store(v_ptr + (index % C) * S + index // C, v, mask=index < K)
    else:
        if chunk == 0:
            offs_n = tl.arange(0, _MAX_CHUNKS)
            parts = tl.load(norms_ptr + matrix * _MAX_CHUNKS + offs_n, mask=offs_n < chunks, other=0.0)
            tl.store(sigma_ptr + matrix, tl.sum(parts))


@triton.jit
def _rescale_kernel(
    matrices_ptr, addresses_ptr, items_ptr,  # (L, FIELDS) int64, (L, 3) int64, (programs, 2) int32
    sigma_ptr, targets_ptr,  # (L,), (L,) or None
    target,
    W_DTYPE: tl.constexpr, BLOCK: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    """Multiply W in place by target / sigma, unless sigma is below SMALLEST_NORM or not finite."""
    matrix = tl.load(items_ptr + tl.program_id(0) * 2)
    begin = tl.load(items_ptr + tl.program_id(0) * 2 + 1) * ELEMENTS
    entry_ptr = matrices_ptr + matrix * _FIELDS
    size = tl.load(entry_ptr + _R).to(tl.int32) * tl.load(entry_ptr + _K).to(tl.int32)
    w_address = tl.load(addresses_ptr + matrix * 3 + _W)
    sigma = tl.load(sigma_ptr + matrix)
    if targets_ptr is not None:
        target = tl.load(targets_ptr + matrix)
    if _is_scalable(sigma):
        if tl.load(entry_ptr + _FLAT_ALIGNED) != 0:
            w_ptr = tl.multiple_of(w_address.to(tl.pointer_type(W_DTYPE)), 16)
            scale_chunk(w_ptr, w_ptr, target / sigma, begin, size, BLOCK, ELEMENTS)
        else:
            w_ptr = w_address.to(tl.pointer_type(W_DTYPE))
            scale_chunk(w_ptr, w_ptr, target / sigma, begin, size, BLOCK, ELEMENTS)


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
    """Return sigmas (L,), float32, of all matrices of `tensors` and, with `update`, move `us` and `vs` in place.

    `tensors` of one dtype: matrices (R, ...), with u (R,) and v (K,), and stacks (E, R, ...), with u (E, R) and v
    (E, K), whose sigmas follow each other. Each matrix is contiguous or channels_last, those of a stack lie one behind
    the other; u and v are float32 and contiguous. Raises ValueError and TypeError for others, RuntimeError if such a
    list is seen for the first time while a CUDA graph is captured.
    """
    are_stacks = [u.ndim == 2 for u in us]
    _check_norms(tensors, us, vs, are_stacks, n_power_iterations)
    v_first = v_first and update
    stacked = stacked_tables(tensors, are_stacks, v_first)
    addresses = stacked_addresses(stacked, tensors, us, vs)
    tables, device, dtype = stacked.tables, tensors[0].device, tensors[0].dtype
    count = len(tables.layout.shapes)
    _, z_size, t_size, partial_size = tables.layout.sizes
    z, t, partial, norms, sigmas, firsts = (
        torch.empty(size, device=device)
        for size in (z_size, t_size, partial_size, count * MAX_CHUNKS, count, count if update else 0)
    )
    buffers = Buffers(z, t, partial, norms)
    # Each iteration moves u and v, or leaves them, before the next: whole passes.
    for _ in range(n_power_iterations if update else 1):
        launch_sweep(tables, addresses, buffers, dtype, eps, True, update)
        launch_reduce(tables, addresses, buffers, firsts if update else None, eps, update)
        _launch_finish(stacked, addresses, buffers, sigmas, firsts, eps, update)
    return sigmas


def scale_spectral_norms(
    tensors: Sequence[Tensor], are_stacks: Sequence[bool], sigmas: Tensor, targets: Tensor | float
) -> None:
    """Multiply every matrix in place by target / sigma, unless sigma is below SMALLEST_NORM or not finite.

    `tensors` as `spectral_norms` takes them; `sigmas` (L,) float32, `targets` one number or float32 (L,).
    """
    _check_tensors("scale_spectral_norms", tensors, are_stacks)
    given = targets if isinstance(targets, Tensor) else None
    check_contiguous("scale_spectral_norms", ("sigmas", "targets"), (sigmas, given))
    stacked = stacked_tables(tensors, are_stacks, False)
    nothing = [None] * len(tensors)
    addresses, layout = stacked_addresses(stacked, tensors, nothing, nothing), stacked.tables.layout
    config, grid, dtype = layout.configs.scale, (len(layout.flat),), tensors[0].dtype
    target = 1.0 if isinstance(targets, Tensor) else float(targets)

    def needs() -> Needs:
        size = layout.counts[0] * dtype.itemsize
        return Needs(flops=layout.counts[0], bytes_read=size + 8 * len(layout.shapes), bytes_written=size)

    launch(
        "spectral_norm rescale",
        _rescale_kernel,
        dict(
            matrices_ptr=stacked.tables.matrices, addresses_ptr=addresses, items_ptr=stacked.tables.flat,
            sigma_ptr=sigmas, targets_ptr=given,
        ),
        (grid, config, dtype, target),
        lambda: Launch(
            grid, config, dict(target=target),
            dict(W_DTYPE=triton_dtype(dtype), BLOCK=config.BLOCK, ELEMENTS=config.ELEMENTS), needs,
        ),
    )  # fmt: skip


def _launch_finish(
    stacked: Stacked, addresses: Tensor, buffers: Buffers, sigmas: Tensor, firsts: Tensor, eps: float, update: bool
) -> None:
    tables, layout = stacked.tables, stacked.tables.layout
    config, grid = layout.configs.reduce, (len(layout.reduce),)

    def needs() -> Needs:
        _, rows, columns = layout.counts
        moved = 4 * (rows + columns) if update else 0
        return Needs(bytes_read=moved + 4 * len(layout.shapes), bytes_written=moved + 4 * len(layout.shapes))

    launch(
        name_of("finish", layout.v_first),
        _finish_kernel,
        dict(
            matrices_ptr=tables.matrices, addresses_ptr=addresses, items_ptr=tables.reduce, sigma_ptr=sigmas,
            firsts_ptr=firsts, z_ptr=buffers.z, t_ptr=buffers.t, norms_ptr=buffers.norms,
        ),
        (grid, config, layout.v_first, eps, update),
        lambda: Launch(
            grid, config, dict(eps=eps), dict(V_FIRST=layout.v_first, UPDATE=update, BLOCK=config.BLOCK), needs
        ),
    )  # fmt: skip


def _check_tensors(op: str, tensors: Sequence[Tensor], are_stacks: Sequence[bool]) -> None:
    if not tensors:
        raise ValueError(f"{op}: tensors must have at least one tensor, got none")
    for i, (tensor, is_stack) in enumerate(zip(tensors, are_stacks, strict=True)):
        check_dtype(op, f"tensors[{i}]", tensor, FLOAT_DTYPES if i == 0 else (tensors[0].dtype,))
        check_same_device(op, "tensors[0]", tensors[0], **{f"tensors[{i}]": tensor})
        refusal = refusal_of(first_of(tensor, is_stack)) if tensor.numel() else "have elements"
        if refusal is None and not is_dense_stack(tensor, is_stack):
            refusal = "hold its matrices one behind the other"
        if refusal is not None:
            raise ValueError(f"{op}: tensors[{i}] must {refusal}, got shape {tuple(tensor.shape)}")


def _check_norms(
    tensors: Sequence[Tensor], us: Sequence[Tensor], vs: Sequence[Tensor], are_stacks: Sequence[bool], iterations: int
) -> None:
    op = "spectral_norms"
    if not len(tensors) == len(us) == len(vs):
        sizes = f"{len(tensors)}, {len(us)} and {len(vs)}"
        raise ValueError(f"{op}: tensors, us and vs must have one length, got {sizes}")
    if iterations < 1:
        raise ValueError(f"{op}: n_power_iterations must be at least 1, got {iterations}")
    _check_tensors(op, tensors, are_stacks)
    for i, (tensor, u, v, is_stack) in enumerate(zip(tensors, us, vs, are_stacks, strict=True)):
        matrix, leading = first_of(tensor, is_stack), tensor.shape[:1] if is_stack else ()
        for name, vector, size in (("us", u, matrix.shape[0]), ("vs", v, matrix[0].numel())):
            check_dtype(op, f"{name}[{i}]", vector, (torch.float32,))
            letters = ("E, " if is_stack else "") + ("R," if name == "us" else "K,")
            check_shape(op, f"{name}[{i}]", vector, (*leading, size), letters)
            check_contiguous(op, (f"{name}[{i}]",), (vector,))
            check_same_device(op, "tensors[0]", tensors[0], **{f"{name}[{i}]": vector})
