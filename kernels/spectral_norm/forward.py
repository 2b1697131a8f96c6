"""W/sigma for a list of matrices after n power iterations, in three launches (two more for each further iteration).

    z = W v,  u = z/|z|,  t = Wᵀz/|z| = Wᵀu,  v = t/|t|,  sigma = uᵀWv = |t|       (torch's order, u then v)

Lengths below eps are taken as eps. z and t come from one reading of W (sweep.py). With `v_first`, the order of torch's
older hook and of BigGAN, t = Wᵀu comes before z = W v: rows and columns swap roles.

Grids: sweep, a program for each run of rows (or columns); reduce, one for each chunk of the vector that is summed over
programs; scale, one for each chunk of W. Partial sums are added in a fixed order: the same bits in every run and on
every rank. All of it is float32. Oracle: `reference.power_iteration`, `reference.normalise`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import FLOAT_DTYPES, check_contiguous, check_dtype, check_same_device, check_shape
from ..launch import Launch, Needs, launch, size_of
from ..tiles import triton_dtype
from .addresses import addresses_of
from .sweep import (
    _C,
    _CHUNKS,
    _FIELDS,
    _FLAT_ALIGNED,
    _K,
    _MAX_CHUNKS,
    _OFFSET_UNIT,
    _OUT,
    _PARTIAL,
    _PARTS,
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
from .tables import MAX_CHUNKS, Tables, refusal_of, tables_for


@triton.jit
def _is_length(norm):
    """Return whether a vector of this norm has a direction: from one of zeros u and v would never come back."""
    return (norm > 0) & (norm < float("inf"))


@triton.jit
def _reduce_kernel(
    matrices_ptr, addresses_ptr, items_ptr,  # (L, FIELDS) int64, (L, 3) int64, (programs, 2) int32
    z_ptr, t_ptr, partial_ptr, norms_ptr,  # as in the sweep
    firsts_ptr,  # (L,) or None
    eps,
    V_FIRST: tl.constexpr, UPDATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """With UPDATE, divide the first vector by its length; sum the second, divide it likewise, and store its |.|^2.

    Given `firsts_ptr`, store the first vector's length there, and leave the vector as it is. Without UPDATE, leave u
    and v as they are and store u·z, a partial sum for each chunk of rows.
    """
    matrix = tl.load(items_ptr + tl.program_id(0) * 2)
    chunk = tl.load(items_ptr + tl.program_id(0) * 2 + 1)
    entry_ptr = matrices_ptr + matrix * _FIELDS
    R = tl.load(entry_ptr + _R).to(tl.int32)
    K = tl.load(entry_ptr + _K).to(tl.int32)
    chunks = tl.load(entry_ptr + _CHUNKS).to(tl.int32)
    z_ptr += tl.load(entry_ptr + _Z) * _OFFSET_UNIT
    t_ptr += tl.load(entry_ptr + _T) * _OFFSET_UNIT
    address_ptr = addresses_ptr + matrix * 3
    u_ptr = tl.load(address_ptr + _U).to(tl.pointer_type(tl.float32))
    v_ptr = tl.load(address_ptr + _V).to(tl.pointer_type(tl.float32))
    C = tl.load(entry_ptr + _C).to(tl.int32)
    S = tl.load(entry_ptr + _S).to(tl.int32)
    offs = tl.arange(0, BLOCK)
    if UPDATE:
        first_ptr, second_ptr = z_ptr, t_ptr
        first_size, second_size = R, K
        if V_FIRST:
            first_ptr, second_ptr = t_ptr, z_ptr
            first_size, second_size = K, R
        acc = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, first_size, BLOCK):
            x = tl.load(first_ptr + start + offs, mask=start + offs < first_size, other=0.0)
            acc += x * x
        norm = tl.sqrt_rn(tl.sum(acc))
        length = tl.maximum(norm, eps)
        if firsts_ptr is None:
            moving = tl.where(_is_length(norm), first_size, 0)
            for start in range(chunk * BLOCK, moving, chunks * BLOCK):
                index = start + offs
                mask = index < first_size
                x = tl.load(first_ptr + index, mask=mask, other=0.0) / length
                # The other programs still need the undivided vector: only the buffer gets the divided one.
                if V_FIRST:
                    tl.store(v_ptr + (index % C) * S + index // C, x, mask=mask)
                else:
                    tl.store(u_ptr + index, x, mask=mask)
        else:
            if chunk == 0:
                tl.store(firsts_ptr + matrix, norm)
        index = chunk * BLOCK + offs
        mask = index < second_size
        partial_ptr += tl.load(entry_ptr + _PARTIAL) * _OFFSET_UNIT
        parts = tl.load(entry_ptr + _PARTS).to(tl.int32)
        acc = tl.zeros((BLOCK,), tl.float32)
        for _ in range(0, parts):
            acc += tl.load(partial_ptr + index, mask=mask, other=0.0)
            partial_ptr += second_size
        acc = acc / length
        tl.store(second_ptr + index, acc, mask=mask)
        tl.store(norms_ptr + matrix * _MAX_CHUNKS + chunk, tl.sum(acc * acc))
    else:
        acc = tl.zeros((BLOCK,), tl.float32)
        for start in range(chunk * BLOCK, R, chunks * BLOCK):
            index = start + offs
            u = tl.load(u_ptr + index, mask=index < R, other=0.0)
            acc += u * tl.load(z_ptr + index, mask=index < R, other=0.0)
        tl.store(norms_ptr + matrix * _MAX_CHUNKS + chunk, tl.sum(acc))


@triton.jit
def _scale_kernel(
    matrices_ptr, addresses_ptr, items_ptr,  # (L, FIELDS) int64, (L, 3) int64, (programs, 2) int32
    out_ptr, sigma_ptr,  # all W/sigma, (L,)
    z_ptr, t_ptr, norms_ptr,  # as in the sweep; z and t end as copies of u and v, v in the order of W's columns
    eps,
    W_DTYPE: tl.constexpr, V_FIRST: tl.constexpr, UPDATE: tl.constexpr,
    BLOCK: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    """Store sigma and W/sigma, and finish u and v."""
    matrix = tl.load(items_ptr + tl.program_id(0) * 2)
    chunk = tl.load(items_ptr + tl.program_id(0) * 2 + 1)
    entry_ptr = matrices_ptr + matrix * _FIELDS
    R = tl.load(entry_ptr + _R).to(tl.int32)
    K = tl.load(entry_ptr + _K).to(tl.int32)
    size = R * K
    if UPDATE:
        length, sigma = _length(norms_ptr, matrix, tl.load(entry_ptr + _CHUNKS), eps)
        moving = tl.where(_is_length(sigma), tl.maximum(R, K), 0)
    else:
        offs_n = tl.arange(0, _MAX_CHUNKS)
        mask_n = offs_n < tl.load(entry_ptr + _CHUNKS)
        sigma = tl.sum(tl.load(norms_ptr + matrix * _MAX_CHUNKS + offs_n, mask=mask_n, other=0.0))
    if chunk == 0:
        tl.store(sigma_ptr + matrix, sigma)
    offs = tl.arange(0, BLOCK)

    z_ptr += tl.load(entry_ptr + _Z) * _OFFSET_UNIT
    t_ptr += tl.load(entry_ptr + _T) * _OFFSET_UNIT
    address_ptr = addresses_ptr + matrix * 3
    u_ptr = tl.load(address_ptr + _U).to(tl.pointer_type(tl.float32))
    v_ptr = tl.load(address_ptr + _V).to(tl.pointer_type(tl.float32))
    C = tl.load(entry_ptr + _C).to(tl.int32)
    S = tl.load(entry_ptr + _S).to(tl.int32)
    stride = tl.cdiv(size, ELEMENTS) * BLOCK
    for start in range(chunk * BLOCK, R, stride):
        index = start + offs
        if UPDATE and V_FIRST:
            u = tl.load(z_ptr + index, mask=index < R, other=0.0) / length
            tl.store(u_ptr + index, u, mask=index < tl.minimum(R, moving))
        else:
            u = tl.load(u_ptr + index, mask=index < R, other=0.0)
        tl.store(z_ptr + index, u, mask=index < R)
    for start in range(chunk * BLOCK, K, stride):
        index = start + offs
        element = (index % C) * S + index // C
        if UPDATE and not V_FIRST:
            v = tl.load(t_ptr + index, mask=index < K, other=0.0) / length
            tl.store(v_ptr + element, v, mask=index < tl.minimum(K, moving))
        else:
            v = tl.load(v_ptr + element, mask=index < K, other=0.0)
        tl.store(t_ptr + index, v, mask=index < K)

    w_address = tl.load(address_ptr + _W)
    out_ptr += tl.load(entry_ptr + _OUT) * _OFFSET_UNIT
    factor = 1.0 / sigma
    begin = chunk * ELEMENTS
    if tl.load(entry_ptr + _FLAT_ALIGNED) != 0:
        w_ptr = tl.multiple_of(w_address.to(tl.pointer_type(W_DTYPE)), 16)
        scale_chunk(w_ptr, out_ptr, factor, begin, size, BLOCK, ELEMENTS)
    else:
        scale_chunk(w_address.to(tl.pointer_type(W_DTYPE)), out_ptr, factor, begin, size, BLOCK, ELEMENTS)


@triton.jit
def scale_chunk(w_ptr, out_ptr, factor, begin, size, BLOCK: tl.constexpr, ELEMENTS: tl.constexpr):
    """Store `factor` times W, from element `begin` on ELEMENTS of `size`; `out_ptr` may be `w_ptr`."""
    for start in range(begin, tl.minimum(begin + ELEMENTS, size), 4 * BLOCK):
        offs = start + tl.arange(0, 4 * BLOCK)
        # size is a multiple of nothing in general: the last block is masked, all others are loaded in one piece each.
        if start + 4 * BLOCK <= size:
            tl.store(out_ptr + offs, (tl.load(w_ptr + offs).to(tl.float32) * factor).to(out_ptr.dtype.element_ty))
        else:
            w = tl.load(w_ptr + offs, mask=offs < size, other=0.0).to(tl.float32)
            tl.store(out_ptr + offs, (w * factor).to(out_ptr.dtype.element_ty), mask=offs < size)


class Normalised(NamedTuple):
    """W/sigma of all matrices in one flat tensor, each from its `tables.offsets` on, and what the gradient needs.

    `sigmas` (L,) float32; `u` and `v` flat float32 copies, v in the order in which W's columns are stored.
    """

    out: Tensor
    sigmas: Tensor
    u: Tensor
    v: Tensor


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
) -> Normalised:
    """Return W/sigma of every one of `weights` and, with `update`, update `us` and `vs` in place.

    `weights` of one dtype, (R, ...) each, contiguous or channels_last; `us` (R,) and `vs` (K,) float32. `out`, a flat
    tensor as an earlier call returned it, is written instead of a new one. `v_first` is the order of torch's older
    hook. A matrix of zeros gives NaN, as in torch. There u and v stay, and where a matrix is not finite. `sigmas` (L,),
    without `update`, are taken instead of computed: a saved sigma gives the bits of W/sigma back, which uᵀWv, rounded
    otherwise, would not.

    Raises ValueError for shapes and strides that do not fit and for more rows or columns than MAX_ROWS and MAX_COLUMNS,
    TypeError for dtypes, RuntimeError if such a list is seen for the first time while a CUDA graph is captured.
    """
    _check(weights, us, vs, n_power_iterations)
    check_contiguous("spectral_norm_fwd", ("out",), (out,))
    tables, addresses = tables_for(weights, v_first and update), addresses_of(weights, us, vs)
    device, dtype = weights[0].device, weights[0].dtype
    out_size, z_size, t_size, partial_size = tables.layout.sizes

    def new(size: int) -> Tensor:
        return torch.empty(size, device=device)

    if out is None:
        out = torch.empty(out_size, device=device, dtype=out_dtype or dtype)
    if sigmas is None or update:
        norms, sweeps = new(len(weights) * MAX_CHUNKS), n_power_iterations if update else 1
    else:  # a saved sigma is the only partial sum of uᵀWv
        norms, sweeps = torch.nn.functional.pad(sigmas[:, None], (0, MAX_CHUNKS - 1)).flatten(), 0
    buffers, found = Buffers(new(z_size), new(t_size), new(partial_size), norms), new(len(weights))
    for iteration in range(sweeps):
        launch_sweep(tables, addresses, buffers, dtype, eps, iteration == 0, update)
        launch_reduce(tables, addresses, buffers, None, eps, update)
    _launch_scale(tables, addresses, buffers, out, found, dtype, eps, update)
    return Normalised(out, found, buffers.z, buffers.t)


def launch_reduce(
    tables: Tables, addresses: Tensor, buffers: Buffers, firsts: Tensor | None, eps: float, update: bool
) -> None:
    """Launch the sum of what `launch_sweep` left in the buffers; the lengths of the first vectors go to `firsts` (L,).

    Without `firsts`, the first vectors are divided by them.
    """
    layout = tables.layout
    config, grid = layout.configs.reduce, (len(layout.reduce),)

    def needs() -> Needs:
        _, rows, columns = layout.counts
        partial = buffers.partial.numel() if update else 0
        return Needs(
            flops=partial,
            bytes_read=4 * (partial + rows + columns if update else rows),
            bytes_written=4 * (rows + columns) if update else 0,
        )

    launch(
        name_of("reduce", layout.v_first),
        _reduce_kernel,
        dict(
            matrices_ptr=tables.matrices, addresses_ptr=addresses, items_ptr=tables.reduce,
            z_ptr=buffers.z, t_ptr=buffers.t, partial_ptr=buffers.partial, norms_ptr=buffers.norms, firsts_ptr=firsts,
        ),
        (grid, config, layout.v_first, eps, update),
        lambda: Launch(
            grid, config, dict(eps=eps), dict(V_FIRST=layout.v_first, UPDATE=update, BLOCK=config.BLOCK), needs
        ),
    )  # fmt: skip


def _launch_scale(
    tables: Tables, addresses: Tensor, buffers: Buffers, out: Tensor, sigmas: Tensor, dtype: torch.dtype, eps: float,
    update: bool,
) -> None:  # fmt: skip
    layout = tables.layout
    config, grid = layout.configs.scale, (len(layout.flat),)

    def needs() -> Needs:
        elements, rows, columns = layout.counts
        return Needs(
            flops=elements,
            bytes_read=elements * dtype.itemsize + 4 * (rows + columns),
            bytes_written=elements * out.element_size() + 8 * (rows + columns) + size_of(sigmas),
        )

    launch(
        name_of("scale", layout.v_first),
        _scale_kernel,
        dict(
            matrices_ptr=tables.matrices, addresses_ptr=addresses, items_ptr=tables.flat, out_ptr=out, sigma_ptr=sigmas,
            z_ptr=buffers.z, t_ptr=buffers.t, norms_ptr=buffers.norms,
        ),
        (grid, config, layout.v_first, dtype, eps, update),
        lambda: Launch(
            grid,
            config,
            dict(eps=eps),
            dict(
                W_DTYPE=triton_dtype(dtype), V_FIRST=layout.v_first, UPDATE=update,
                BLOCK=config.BLOCK, ELEMENTS=config.ELEMENTS,
            ),
            needs,
        ),
    )  # fmt: skip


def _check(weights: Sequence[Tensor], us: Sequence[Tensor], vs: Sequence[Tensor], n_power_iterations: int) -> None:
    op = "spectral_norm_fwd"
    if not weights or not len(weights) == len(us) == len(vs):
        sizes = f"{len(weights)}, {len(us)} and {len(vs)}"
        raise ValueError(f"{op}: weights, us and vs must have one length, at least 1, got {sizes}")
    if n_power_iterations < 1:
        raise ValueError(f"{op}: n_power_iterations must be at least 1, got {n_power_iterations}")
    check_dtype(op, "weights[0]", weights[0], FLOAT_DTYPES)
    for i, (weight, u, v) in enumerate(zip(weights, us, vs, strict=True)):
        refusal = refusal_of(weight)
        if refusal is not None:
            raise ValueError(f"{op}: weights[{i}] must {refusal}, got shape {tuple(weight.shape)}")
        check_dtype(op, f"weights[{i}]", weight, (weights[0].dtype,))
        check_dtype(op, f"us[{i}]", u, (torch.float32,))
        check_dtype(op, f"vs[{i}]", v, (torch.float32,))
        check_shape(op, f"us[{i}]", u, (weight.shape[0],), "R,")
        check_shape(op, f"vs[{i}]", v, (weight.numel() // weight.shape[0],), "K,")
        if not (u.is_contiguous() and v.is_contiguous()):
            raise ValueError(f"{op}: us[{i}] and vs[{i}] must be contiguous, got strides {u.stride()}, {v.stride()}")
        check_same_device(op, "weights[0]", weights[0], **{f"weights[{i}]": weight, f"us[{i}]": u, f"vs[{i}]": v})
