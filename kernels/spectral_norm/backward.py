"""dW = (G - <G, W/sigma> u vᵀ)/sigma for a list of matrices, G the gradient of W/sigma, in two launches.

`_dot_kernel`, one program for each chunk of W: partial sums of <G, W>. `_d_weight_kernel`, one program for each tile
of rows and columns: adds the partial sums of its matrix in a fixed order and writes dW. float32 throughout. The
addresses of G are new whenever the allocator gives others; then `_write_addresses_kernel` carries them to the device
as its arguments, which a CUDA graph may capture, and an upload from unpinned memory may not.
Oracle: `reference.normalise_backward`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import FLOAT_DTYPES, check_contiguous, check_dtype, check_shape
from ..configs import LaunchConfig
from ..launch import Launch, Needs, launch, size_of
from ..tiles import triton_dtype
from .sweep import _FIELDS, _FLAT_ALIGNED, _K, _OFFSET_UNIT, _OUT, _R, _T, _W, _Z
from .tables import Tables, is_capturing, tables_for, tile_items, vector

_NOWHERE = tl.constexpr(1 << 60)
"""The address of a gradient that there is not; as wide and as aligned as a real one."""

_ADDRESSES_A_LAUNCH = 16
_ONE_WARP = LaunchConfig(BLOCK=_ADDRESSES_A_LAUNCH, num_warps=1, num_stages=3)


@triton.jit
def _write_addresses_kernel(
    table_ptr, count,
    a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, a11, a12, a13, a14, a15,
):  # fmt: skip
    tl.store(table_ptr + 0, a0)
    tl.store(table_ptr + 1, a1, mask=count > 1)
    tl.store(table_ptr + 2, a2, mask=count > 2)
    tl.store(table_ptr + 3, a3, mask=count > 3)
    tl.store(table_ptr + 4, a4, mask=count > 4)
    tl.store(table_ptr + 5, a5, mask=count > 5)
    tl.store(table_ptr + 6, a6, mask=count > 6)
    tl.store(table_ptr + 7, a7, mask=count > 7)
    tl.store(table_ptr + 8, a8, mask=count > 8)
    tl.store(table_ptr + 9, a9, mask=count > 9)
    tl.store(table_ptr + 10, a10, mask=count > 10)
    tl.store(table_ptr + 11, a11, mask=count > 11)
    tl.store(table_ptr + 12, a12, mask=count > 12)
    tl.store(table_ptr + 13, a13, mask=count > 13)
    tl.store(table_ptr + 14, a14, mask=count > 14)
    tl.store(table_ptr + 15, a15, mask=count > 15)


@triton.jit
def _dot_kernel(
    matrices_ptr, items_ptr, grads_ptr, partial_ptr,  # (L, FIELDS) int64, (programs, 2) int32, (L,) int64, (programs,)
    W_DTYPE: tl.constexpr, G_DTYPE: tl.constexpr, BLOCK: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    matrix = tl.load(items_ptr + tl.program_id(0) * 2)
    begin = tl.load(items_ptr + tl.program_id(0) * 2 + 1) * ELEMENTS
    entry_ptr = matrices_ptr + matrix * _FIELDS
    grad = tl.load(grads_ptr + matrix)
    if grad != _NOWHERE:
        size = (tl.load(entry_ptr + _R) * tl.load(entry_ptr + _K)).to(tl.int32)
        w_address = tl.load(entry_ptr + _W)
        g_ptr = tl.multiple_of(grad.to(tl.pointer_type(G_DTYPE)), 16)
        if tl.load(entry_ptr + _FLAT_ALIGNED) != 0:
            w_ptr = tl.multiple_of(w_address.to(tl.pointer_type(W_DTYPE)), 16)
            total = _dot(w_ptr, g_ptr, begin, size, BLOCK, ELEMENTS)
        else:
            total = _dot(w_address.to(tl.pointer_type(W_DTYPE)), g_ptr, begin, size, BLOCK, ELEMENTS)
        tl.store(partial_ptr + tl.program_id(0), total)


@triton.jit
def _dot(w_ptr, g_ptr, begin, size, BLOCK: tl.constexpr, ELEMENTS: tl.constexpr):
    acc = tl.zeros((BLOCK,), tl.float32)
    for start in range(begin, tl.minimum(begin + ELEMENTS, size), BLOCK):
        offs = start + tl.arange(0, BLOCK)
        if start + BLOCK <= size:
            acc += tl.load(w_ptr + offs).to(tl.float32) * tl.load(g_ptr + offs).to(tl.float32)
        else:
            w = tl.load(w_ptr + offs, mask=offs < size, other=0.0).to(tl.float32)
            acc += w * tl.load(g_ptr + offs, mask=offs < size, other=0.0).to(tl.float32)
    return tl.sum(acc)


@triton.jit
def _d_weight_kernel(
    matrices_ptr, items_ptr, firsts_ptr,  # (L, FIELDS) int64, (programs, 4) int32, (L + 1,) int32: see TileItems
    grads_ptr, partial_ptr, sigma_ptr, u_ptr, v_ptr,  # (L,) int64, fp32: partial sums, (L,), rows, columns
    d_weight_ptr,  # as W/sigma
    UNIT: tl.constexpr, G_DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    item_ptr = items_ptr + tl.program_id(0) * 4
    matrix = tl.load(item_ptr)
    grad = tl.load(grads_ptr + matrix)
    if grad != _NOWHERE:
        entry_ptr = matrices_ptr + matrix * _FIELDS
        K = tl.load(entry_ptr + _K).to(tl.int32)
        sigma = tl.load(sigma_ptr + matrix)
        offs = tl.arange(0, BLOCK)
        acc = tl.zeros((BLOCK,), tl.float32)
        last = tl.load(firsts_ptr + matrix + 1)
        for start in range(tl.load(firsts_ptr + matrix), last, BLOCK):
            acc += tl.load(partial_ptr + start + offs, mask=start + offs < last, other=0.0)
        share = tl.sum(acc) / (sigma * sigma)  # <G, W/sigma>/sigma
        row_0 = tl.load(item_ptr + 1).to(tl.int64)
        column_0 = tl.load(item_ptr + 2) * 128
        rows = tl.load(item_ptr + 3)
        u_ptr += tl.load(entry_ptr + _Z) * _OFFSET_UNIT + row_0
        v_ptr += tl.load(entry_ptr + _T) * _OFFSET_UNIT
        g_ptr = tl.multiple_of(grad.to(tl.pointer_type(G_DTYPE)), 16)
        d_weight_ptr += tl.load(entry_ptr + _OUT) * _OFFSET_UNIT
        factor = 1.0 / sigma
        if K % UNIT == 0:
            aligned_K = K // UNIT * UNIT
            offset = row_0 * aligned_K
            if K <= 128:
                _d_weight(
                    g_ptr + offset, u_ptr, v_ptr, d_weight_ptr + offset, column_0, rows, aligned_K, factor, share,
                    UNIT, 32, 128,
                )  # fmt: skip
            else:
                _d_weight(
                    g_ptr + offset, u_ptr, v_ptr, d_weight_ptr + offset, column_0, rows, aligned_K, factor, share,
                    UNIT, 4, 1024,
                )  # fmt: skip
        else:
            offset = row_0 * K
            if K <= 128:
                _d_weight(
                    g_ptr + offset, u_ptr, v_ptr, d_weight_ptr + offset, column_0, rows, K, factor, share, 1, 32, 128,
                )  # fmt: skip
            else:
                _d_weight(
                    g_ptr + offset, u_ptr, v_ptr, d_weight_ptr + offset, column_0, rows, K, factor, share, 1, 4, 1024,
                )  # fmt: skip


@triton.jit
def _d_weight(
    g_ptr, u_ptr, v_ptr, d_weight_ptr, column_0, rows, K, factor, share,
    UNIT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    K = K // UNIT * UNIT
    offs_k = column_0 + tl.arange(0, BLOCK_K)
    v = tl.load(v_ptr + offs_k, mask=offs_k < K, other=0.0) * share
    for start in range(0, rows, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        mask = (row < rows)[:, None] & (offs_k < K)[None, :]
        offs = row.to(tl.int64)[:, None] * K + offs_k[None, :]
        g = tl.load(g_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        u = tl.load(u_ptr + row, mask=row < rows, other=0.0)
        d_weight = g * factor - u[:, None] * v[None, :]
        tl.store(d_weight_ptr + offs, d_weight.to(d_weight_ptr.dtype.element_ty), mask=mask)


def spectral_norm_bwd(
    grads: Sequence[Tensor | None], weights: Sequence[Tensor], sigmas: Tensor, u: Tensor, v: Tensor
) -> Tensor:
    """Return dW of all matrices in one flat tensor of the weights' dtype, laid out as the forward's W/sigma.

    `grads` of W/sigma, of one dtype, each with the shape of its weight, or None: that matrix's part of the result is
    left unwritten. `weights` are those of the forward, unchanged since; `sigmas`, `u` and `v` as it returned them.
    """
    op = "spectral_norm_bwd"
    check_contiguous(op, ("sigmas", "u", "v"), (sigmas, u, v))
    tables, device = tables_for(weights, weights, weights, False), sigmas.device  # u and v come in the flat copies
    present = [grad for grad in grads if grad is not None]
    d_weight = torch.empty(tables.layout.sizes[0], device=device, dtype=weights[0].dtype)
    if not present:
        return d_weight
    for i, (grad, weight) in enumerate(zip(grads, weights, strict=True)):
        if grad is not None:
            check_dtype(op, f"grads[{i}]", grad, FLOAT_DTYPES if grad is present[0] else (present[0].dtype,))
            check_shape(op, f"grads[{i}]", grad, weight.shape, "R, ...")
    dense = [None if grad is None else _as_stored(grad, weight) for grad, weight in zip(grads, weights, strict=True)]
    partial = torch.empty(len(tables.layout.flat), device=device)
    addresses = _addresses([_address(grad) for grad in dense], device)
    _launch_dot(tables, addresses, partial, weights[0].dtype, present[0].dtype)
    _launch_d_weight(tables, addresses, partial, sigmas, u, v, d_weight, present[0].dtype)
    return d_weight


def _launch_dot(tables: Tables, addresses: Tensor, partial: Tensor, w_dtype: torch.dtype, g_dtype: torch.dtype) -> None:
    layout = tables.layout
    config, grid = layout.configs.scale, (len(layout.flat),)

    def describe() -> Launch:
        elements, _, _ = layout.counts
        constexprs = dict(
            W_DTYPE=triton_dtype(w_dtype), G_DTYPE=triton_dtype(g_dtype),
            BLOCK=4 * config.BLOCK, ELEMENTS=config.ELEMENTS,
        )  # fmt: skip
        needs = Needs(
            flops=2 * elements,
            bytes_read=elements * (w_dtype.itemsize + g_dtype.itemsize),
            bytes_written=size_of(partial),
        )
        return Launch(grid, config, {}, constexprs, lambda: needs)

    launch(
        "spectral_norm gradient, <G, W>",
        _dot_kernel,
        dict(matrices_ptr=tables.matrices, items_ptr=tables.flat, grads_ptr=addresses, partial_ptr=partial),
        (grid, config, w_dtype, g_dtype),
        describe,
    )


def _launch_d_weight(
    tables: Tables, addresses: Tensor, partial: Tensor, sigmas: Tensor, u: Tensor, v: Tensor, d_weight: Tensor,
    g_dtype: torch.dtype,
) -> None:  # fmt: skip
    layout = tables.layout
    items = tile_items(layout, d_weight.device)
    config, grid = layout.configs.scale, (len(items.tiles),)

    def describe() -> Launch:
        elements, rows, columns = layout.counts
        unit = vector(min(g_dtype.itemsize, d_weight.element_size()))
        needs = Needs(
            flops=3 * elements,
            bytes_read=elements * g_dtype.itemsize + 4 * (rows + columns),
            bytes_written=elements * d_weight.element_size(),
        )
        constexprs = dict(UNIT=unit, G_DTYPE=triton_dtype(g_dtype), BLOCK=config.BLOCK)
        return Launch(grid, config, {}, constexprs, lambda: needs)

    launch(
        "spectral_norm gradient, dW",
        _d_weight_kernel,
        dict(
            matrices_ptr=tables.matrices, items_ptr=items.tiles, firsts_ptr=items.firsts, grads_ptr=addresses,
            partial_ptr=partial, sigma_ptr=sigmas, u_ptr=u, v_ptr=v, d_weight_ptr=d_weight,
        ),
        (grid, config, g_dtype),
        describe,
    )  # fmt: skip


def _as_stored(grad: Tensor, weight: Tensor) -> Tensor:
    """Return `grad` with the strides of `weight`, from a multiple of 16 bytes on; a copy only if it is not so."""
    if grad.stride() == weight.stride() and grad.data_ptr() % 16 == 0:
        return grad
    return torch.empty_like(weight, dtype=grad.dtype).copy_(grad)


_written: dict[tuple[object, ...], Tensor] = {}
_MOST_WRITTEN = 256


def _address(grad: Tensor | None) -> int:
    """Return where `grad` is; `_NOWHERE` for None and for a tensor without memory."""
    return _NOWHERE.value if grad is None or grad.is_meta else grad.data_ptr()


def _addresses(addresses: list[int], device: torch.device) -> Tensor:
    """Return `addresses` as a table on `device`; the same table where they were asked for before."""
    key = (device, *addresses)
    capturing = is_capturing(device)
    found = None if capturing or device.type == "meta" else _written.get(key)
    if found is not None:
        return found
    table = torch.empty(len(addresses), device=device, dtype=torch.int64)
    for first in range(0, len(addresses), _ADDRESSES_A_LAUNCH):
        some = addresses[first : first + _ADDRESSES_A_LAUNCH]
        some += [_NOWHERE.value] * (_ADDRESSES_A_LAUNCH - len(some))
        numbers = {"count": len(addresses) - first, **{f"a{i}": address for i, address in enumerate(some)}}
        _launch_addresses(table[first:], numbers)
    if not capturing:  # what a graph writes is there only when it is replayed
        if len(_written) >= _MOST_WRITTEN:
            del _written[next(iter(_written))]
        _written[key] = table
    return table


def _launch_addresses(table: Tensor, numbers: dict[str, int]) -> None:
    needs = Needs(bytes_written=8 * min(numbers["count"], _ADDRESSES_A_LAUNCH))
    launch(
        "spectral_norm gradient, addresses",
        _write_addresses_kernel,
        dict(table_ptr=table),
        None,
        lambda: Launch((1,), _ONE_WARP, numbers, {}, lambda: needs),
    )
