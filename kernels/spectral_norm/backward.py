"""dW = (G - <G, W/sigma> u vᵀ)/sigma for a list of matrices, G the gradient of W/sigma, in two launches.

`_dot_kernel`, one program for each chunk of W: partial sums of <G, W>. `_d_weight_kernel`, one program for each tile
of rows and columns: adds the partial sums of its matrix in a fixed order and writes dW. float32 throughout.
Oracle: `reference.normalise_backward`.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import FLOAT_DTYPES, check_contiguous, check_dtype, check_shape
from ..launch import Launch, Needs, launch, size_of
from ..tiles import triton_dtype
from .addresses import NOWHERE, addresses_of
from .sweep import _FIELDS, _FLAT_ALIGNED, _K, _OFFSET_UNIT, _OUT, _R, _T, _Z
from .tables import Tables, tables_for, vector


@triton.jit
def _dot_kernel(
    matrices_ptr, addresses_ptr, items_ptr,  # (L, FIELDS) int64, (L, 2) int64: of G and W, (programs, 2) int32
    partial_ptr,  # (programs,)
    W_DTYPE: tl.constexpr, G_DTYPE: tl.constexpr, BLOCK: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    matrix = tl.load(items_ptr + tl.program_id(0) * 2)
    begin = tl.load(items_ptr + tl.program_id(0) * 2 + 1) * ELEMENTS
    entry_ptr = matrices_ptr + matrix * _FIELDS
    grad = tl.load(addresses_ptr + matrix * 2)
    if grad != NOWHERE:
        size = (tl.load(entry_ptr + _R) * tl.load(entry_ptr + _K)).to(tl.int32)
        w_address = tl.load(addresses_ptr + matrix * 2 + 1)
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
    matrices_ptr, addresses_ptr, items_ptr, firsts_ptr,  # as above; (programs, 4) int32, (L + 1,) int32: see Tables
    partial_ptr, sigma_ptr, u_ptr, v_ptr,  # fp32: partial sums, (L,), rows, columns
    d_weight_ptr,  # as W/sigma
    UNIT: tl.constexpr, G_DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    item_ptr = items_ptr + tl.program_id(0) * 4
    matrix = tl.load(item_ptr)
    grad = tl.load(addresses_ptr + matrix * 2)
    if grad != NOWHERE:
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
    tables, device = tables_for(weights, False), sigmas.device
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
    addresses = addresses_of(dense, weights)
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
        dict(matrices_ptr=tables.matrices, addresses_ptr=addresses, items_ptr=tables.flat, partial_ptr=partial),
        (grid, config, w_dtype, g_dtype),
        describe,
    )


def _launch_d_weight(
    tables: Tables, addresses: Tensor, partial: Tensor, sigmas: Tensor, u: Tensor, v: Tensor, d_weight: Tensor,
    g_dtype: torch.dtype,
) -> None:  # fmt: skip
    layout = tables.layout
    config, grid = layout.configs.scale, (len(tables.tiles),)

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
            matrices_ptr=tables.matrices, addresses_ptr=addresses, items_ptr=tables.tiles, firsts_ptr=tables.firsts,
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
