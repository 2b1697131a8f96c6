"""The products of a power iteration for every W of a list, from one reading of each W.

`_sweep_kernel` gives each program a run of rows: it computes z = W v and its share of t = Wᵀz. A whole row is in
registers, so the row's z is known while the row is still there to be added to t. `_sweep_columns_kernel` swaps rows and
columns: each program owns a run of columns, computes t = Wᵀu, and its share of z = W t from a second reading, out of
cache. The shares lie in memory; forward.py adds them up in a fixed order. All of it is float32.

Why these configs: the more elements a program takes, the fewer shares there are; 2**18 gives SAGAN's 44 matrices 300
programs. With 128 registers a thread two programs share a multiprocessor, and one loads while the other adds. A row of
16384 and its sums are 48K registers, which only sixteen warps hold without spilling.
Oracle: `reference.power_iteration`.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import Launch, Needs, launch, size_of
from ..tiles import triton_dtype
from .tables import FIELDS, MAX_CHUNKS, OFFSET_UNIT, Tables, vector

_FIELDS = tl.constexpr(FIELDS)
_R, _K, _C, _S, _OUT, _Z, _T, _PARTIAL, _PARTS, _CHUNKS, _ALIGNED, _FLAT_ALIGNED = (tl.constexpr(i) for i in range(12))
_W, _U, _V = (tl.constexpr(i) for i in range(3))
"""Columns of the table of addresses, (L, 3)."""

_OFFSET_UNIT = tl.constexpr(OFFSET_UNIT)
_MAX_CHUNKS = tl.constexpr(MAX_CHUNKS)


@triton.jit
def _length(norms_ptr, matrix, chunks, eps):
    """Return max(|second|, eps) and |second|^2 / max(|second|, eps), from the partial sums of squares."""
    offs = tl.arange(0, _MAX_CHUNKS)
    square = tl.sum(tl.load(norms_ptr + matrix * _MAX_CHUNKS + offs, mask=offs < chunks, other=0.0))
    length = tl.maximum(tl.sqrt_rn(square), eps)
    return length, square / length


@triton.jit
def _stage_v(v_ptr, staged_ptr, K, C, S, BLOCK: tl.constexpr):
    """Store v where this program's partial sums will be, in the order in which the columns are stored.

    Gathered into registers instead, v would make the sweep spill.
    """
    for start in range(0, K, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        group = offs // C
        v = tl.load(v_ptr + (offs - group * C) * S + group, mask=offs < K, other=0.0)
        tl.store(staged_ptr + offs, v, mask=offs < K)
    tl.debug_barrier()  # read back by other threads than those that stored it


@triton.jit
def _partial_ptr(partial_ptr, matrices_ptr, items_ptr, size):
    """Return where this program's partial sums go.

    It is looked up at the end of a sweep: kept in a register, it would leave too few for two programs a multiprocessor.
    """
    item_ptr = items_ptr + tl.program_id(0) * 4
    entry_ptr = matrices_ptr + tl.load(item_ptr) * _FIELDS
    return partial_ptr + tl.load(entry_ptr + _PARTIAL) * _OFFSET_UNIT + tl.load(item_ptr + 3).to(tl.int64) * size


@triton.jit
def _sweep_rows(
    w_ptr, v_ptr, z_ptr, partial_ptr, matrices_ptr, items_ptr, rows, K, scale,
    BLOCK_R: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, UNIT: tl.constexpr, UPDATE: tl.constexpr,
):  # fmt: skip
    """Store z and the partial sums of t, from one reading of whole rows, BLOCK_A + BLOCK_B columns wide."""
    K = K // UNIT * UNIT  # says that rows start at multiples of UNIT
    offs_r = tl.arange(0, BLOCK_R)
    offs_a = tl.arange(0, BLOCK_A)
    v_a = tl.load(v_ptr + offs_a, mask=offs_a < K, other=0.0)
    acc_a = tl.zeros((BLOCK_R, BLOCK_A), tl.float32)
    if BLOCK_B > 0:
        offs_b = BLOCK_A + tl.arange(0, BLOCK_B)
        v_b = tl.load(v_ptr + offs_b, mask=offs_b < K, other=0.0)
        acc_b = tl.zeros((BLOCK_R, BLOCK_B), tl.float32)
    for start in range(0, rows, BLOCK_R):
        row = start + offs_r
        mask_r = row < rows
        row_ptr = w_ptr + row.to(tl.int64)[:, None] * K
        a = tl.load(row_ptr + offs_a[None, :], mask=mask_r[:, None] & (offs_a < K)[None, :], other=0.0).to(tl.float32)
        z = tl.sum(a * v_a[None, :], axis=1)
        if BLOCK_B > 0:
            mask_b = mask_r[:, None] & (offs_b < K)[None, :]
            b = tl.load(row_ptr + offs_b[None, :], mask=mask_b, other=0.0).to(tl.float32)
            z += tl.sum(b * v_b[None, :], axis=1)
        z *= scale
        tl.store(z_ptr + row, z, mask=mask_r)
        if UPDATE:
            acc_a += z[:, None] * a
            if BLOCK_B > 0:
                acc_b += z[:, None] * b
    if UPDATE:
        tl.debug_barrier()  # v may lie where the partial sums go
        partial_ptr = _partial_ptr(partial_ptr, matrices_ptr, items_ptr, K)
        tl.store(partial_ptr + offs_a[None, :], tl.sum(acc_a, axis=0, keep_dims=True), mask=(offs_a < K)[None, :])
        if BLOCK_B > 0:
            tl.store(partial_ptr + offs_b[None, :], tl.sum(acc_b, axis=0, keep_dims=True), mask=(offs_b < K)[None, :])


@triton.jit
def _sweep_rows_twice(
    w_ptr, v_ptr, z_ptr, partial_ptr, matrices_ptr, items_ptr, rows, K, scale,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, UPDATE: tl.constexpr,
):  # fmt: skip
    """Do the same from two readings: long rows that start anywhere do not fit the registers."""
    offs_r = tl.arange(0, BLOCK_R)
    offs_k = tl.arange(0, BLOCK_K)
    for start in range(0, rows, BLOCK_R):
        row = start + offs_r
        row_ptr = w_ptr + row.to(tl.int64)[:, None] * K
        z = tl.zeros((BLOCK_R,), tl.float32)
        for column in range(0, K, BLOCK_K):
            offs = column + offs_k
            v = tl.load(v_ptr + offs, mask=offs < K, other=0.0) * scale
            mask = (row < rows)[:, None] & (offs < K)[None, :]
            z += tl.sum(tl.load(row_ptr + offs[None, :], mask=mask, other=0.0).to(tl.float32) * v[None, :], axis=1)
        tl.store(z_ptr + row, z, mask=row < rows)
    if UPDATE:
        tl.debug_barrier()  # z is read back by other threads than those that stored it
        partial_ptr = _partial_ptr(partial_ptr, matrices_ptr, items_ptr, K)
        for column in range(0, K, BLOCK_K):
            offs = column + offs_k
            acc = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
            for start in range(0, rows, BLOCK_R):
                row = start + offs_r
                z = tl.load(z_ptr + row, mask=row < rows, other=0.0)
                mask = (row < rows)[:, None] & (offs < K)[None, :]
                row_ptr = w_ptr + row.to(tl.int64)[:, None] * K
                acc += z[:, None] * tl.load(row_ptr + offs[None, :], mask=mask, other=0.0).to(tl.float32)
            tl.store(partial_ptr + offs, tl.sum(acc, axis=0), mask=offs < K)


@triton.jit
def _sweep_kernel(
    matrices_ptr, addresses_ptr, items_ptr,  # (L, FIELDS) int64, (L, 3) int64, (programs, 4) int32
    z_ptr, t_ptr, partial_ptr, norms_ptr,  # rows, columns, partial sums of t, (L, 16) of |t|^2; all fp32
    eps,
    W_DTYPE: tl.constexpr, UNIT: tl.constexpr, WIDEST_ALIGNED: tl.constexpr, WIDEST_UNALIGNED: tl.constexpr,
    FIRST: tl.constexpr, UPDATE: tl.constexpr, STAGE: tl.constexpr,
):  # fmt: skip
    item_ptr = items_ptr + tl.program_id(0) * 4
    matrix = tl.load(item_ptr)
    row_0 = tl.load(item_ptr + 1).to(tl.int64)
    rows = tl.load(item_ptr + 2)
    entry_ptr = matrices_ptr + matrix * _FIELDS
    address_ptr = addresses_ptr + matrix * 3
    w_address = tl.load(address_ptr + _W)
    K = tl.load(entry_ptr + _K).to(tl.int32)
    z_ptr += tl.load(entry_ptr + _Z) * _OFFSET_UNIT + row_0
    if FIRST:
        scale = 1.0
        given_ptr = tl.load(address_ptr + _V).to(tl.pointer_type(tl.float32))
        C = tl.load(entry_ptr + _C).to(tl.int32)
        S = tl.load(entry_ptr + _S).to(tl.int32)
        v_ptr = _partial_ptr(partial_ptr, matrices_ptr, items_ptr, K)
        _stage_v(given_ptr, v_ptr, K, C, S, STAGE)
    else:  # v of the iteration before, not divided by its length yet
        v_ptr = t_ptr + tl.load(entry_ptr + _T) * _OFFSET_UNIT
        length, _ = _length(norms_ptr, matrix, tl.load(entry_ptr + _CHUNKS), eps)
        scale = 1.0 / length
    if tl.load(entry_ptr + _ALIGNED) != 0:
        if WIDEST_ALIGNED > 0:
            # Without the hint Triton loads element by element. It holds for the pointer, so each branch has its own.
            w_ptr = tl.multiple_of(w_address.to(tl.pointer_type(W_DTYPE)), 16) + row_0 * (K // UNIT * UNIT)
            if K <= 128:
                _sweep_rows(
                    w_ptr, v_ptr, z_ptr, partial_ptr, matrices_ptr, items_ptr, rows, K, scale,
                    32, 128, 0, UNIT, UPDATE,
                )  # fmt: skip
            elif K <= 1024:
                if WIDEST_ALIGNED >= 1024:
                    _sweep_rows(
                        w_ptr, v_ptr, z_ptr, partial_ptr, matrices_ptr, items_ptr, rows, K, scale,
                        4, 1024, 0, UNIT, UPDATE,
                    )  # fmt: skip
            elif K <= 2304:
                if WIDEST_ALIGNED >= 2304:
                    _sweep_rows(
                        w_ptr, v_ptr, z_ptr, partial_ptr, matrices_ptr, items_ptr, rows, K, scale,
                        2, 2048, 256, UNIT, UPDATE,
                    )  # fmt: skip
            elif K <= 4608:
                if WIDEST_ALIGNED >= 4608:
                    _sweep_rows(
                        w_ptr, v_ptr, z_ptr, partial_ptr, matrices_ptr, items_ptr, rows, K, scale,
                        1, 4096, 512, UNIT, UPDATE,
                    )  # fmt: skip
            elif K <= 9216:
                if WIDEST_ALIGNED >= 9216:
                    _sweep_rows(
                        w_ptr, v_ptr, z_ptr, partial_ptr, matrices_ptr, items_ptr, rows, K, scale,
                        1, 8192, 1024, UNIT, UPDATE,
                    )  # fmt: skip
            else:
                if WIDEST_ALIGNED >= 16384:
                    _sweep_rows(
                        w_ptr, v_ptr, z_ptr, partial_ptr, matrices_ptr, items_ptr, rows, K, scale,
                        1, 16384, 0, UNIT, UPDATE,
                    )  # fmt: skip
    else:
        if WIDEST_UNALIGNED > 0:
            w_ptr = w_address.to(tl.pointer_type(W_DTYPE)) + row_0 * K
            if K <= 128:
                _sweep_rows(
                    w_ptr, v_ptr, z_ptr, partial_ptr, matrices_ptr, items_ptr, rows, K, scale,
                    32, 128, 0, 1, UPDATE,
                )  # fmt: skip
            else:
                if WIDEST_UNALIGNED >= 1024:
                    _sweep_rows_twice(
                        w_ptr, v_ptr, z_ptr, partial_ptr, matrices_ptr, items_ptr, rows, K, scale,
                        8, 512, UPDATE,
                    )  # fmt: skip


@triton.jit
def _column_sums(
    w_ptr, u_ptr, scale, t_ptr, partial_ptr, R, K, offs_k,
    UNIT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Store t of BLOCK_K columns, and their share of z = W t, for which W is read again from cache."""
    K = K // UNIT * UNIT  # says that rows start at multiples of UNIT
    offs_r = tl.arange(0, BLOCK_R)
    mask_k = offs_k < K
    acc = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    for start in range(0, R, BLOCK_R):
        row = start + offs_r
        u = tl.load(u_ptr + row, mask=row < R, other=0.0) * scale
        w_tile_ptr = w_ptr + row.to(tl.int64)[:, None] * K + offs_k[None, :]
        acc += u[:, None] * tl.load(w_tile_ptr, mask=(row < R)[:, None] & mask_k[None, :], other=0.0).to(tl.float32)
    t = tl.sum(acc, axis=0)
    tl.store(t_ptr + offs_k, t, mask=mask_k)
    for start in range(0, R, BLOCK_R):
        row = start + offs_r
        w_tile_ptr = w_ptr + row.to(tl.int64)[:, None] * K + offs_k[None, :]
        w = tl.load(w_tile_ptr, mask=(row < R)[:, None] & mask_k[None, :], other=0.0).to(tl.float32)
        tl.store(partial_ptr + row, tl.sum(w * t[None, :], axis=1), mask=row < R)


@triton.jit
def _sweep_columns_kernel(
    matrices_ptr, addresses_ptr, items_ptr,  # (L, FIELDS) int64, (L, 3) int64, (programs, 4) int32
    z_ptr, t_ptr, partial_ptr, norms_ptr,  # rows, columns, partial sums of z, (L, 16) of |z|^2; all fp32
    eps,
    W_DTYPE: tl.constexpr, UNIT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    item_ptr = items_ptr + tl.program_id(0) * 4
    matrix = tl.load(item_ptr)
    part = tl.load(item_ptr + 3)
    entry_ptr = matrices_ptr + matrix * _FIELDS
    address_ptr = addresses_ptr + matrix * 3
    w_address = tl.load(address_ptr + _W)
    R = tl.load(entry_ptr + _R).to(tl.int32)
    K = tl.load(entry_ptr + _K).to(tl.int32)
    partial_ptr += tl.load(entry_ptr + _PARTIAL) * _OFFSET_UNIT + part.to(tl.int64) * R
    if FIRST:
        u_ptr = tl.load(address_ptr + _U).to(tl.pointer_type(tl.float32))
        scale = 1.0
    else:
        u_ptr = z_ptr + tl.load(entry_ptr + _Z) * _OFFSET_UNIT
        length, _ = _length(norms_ptr, matrix, tl.load(entry_ptr + _CHUNKS), eps)
        scale = 1.0 / length
    offs_k = part * BLOCK_K + tl.arange(0, BLOCK_K)
    t_ptr += tl.load(entry_ptr + _T) * _OFFSET_UNIT
    if tl.load(entry_ptr + _ALIGNED) != 0:
        w_ptr = tl.multiple_of(w_address.to(tl.pointer_type(W_DTYPE)), 16)
        _column_sums(w_ptr, u_ptr, scale, t_ptr, partial_ptr, R, K, offs_k, UNIT, BLOCK_R, BLOCK_K)
    else:
        w_ptr = w_address.to(tl.pointer_type(W_DTYPE))
        _column_sums(w_ptr, u_ptr, scale, t_ptr, partial_ptr, R, K, offs_k, 1, BLOCK_R, BLOCK_K)


class Buffers(NamedTuple):
    """What the launches of one pass write for each other, all float32.

    `z` are vectors of rows, `t` vectors of columns, `partial` the partial sums of the second product, `norms` those of
    squared lengths.
    """

    z: Tensor
    t: Tensor
    partial: Tensor
    norms: Tensor


def name_of(launched: str, v_first: bool) -> str:
    """Return the name of a launch in reports."""
    return f"spectral_norm {launched}, {'v first' if v_first else 'u first'}"


def launch_sweep(
    tables: Tables, addresses: Tensor, buffers: Buffers, dtype: torch.dtype, eps: float, first: bool, update: bool
) -> None:
    """Launch the sweep over rows or, for a layout with `v_first`, over columns, of weights of `dtype`.

    The `first` iteration reads u or v, others what the one before left in the buffers. Without `update` only z is
    wanted, from v as it is.
    """
    layout = tables.layout
    config = layout.configs.sweep_columns if layout.v_first else layout.configs.sweep
    grid, widths = (len(layout.sweep),), (layout.widest_aligned, layout.widest_unaligned)

    def describe() -> Launch:
        constexprs = dict(W_DTYPE=triton_dtype(dtype), UNIT=vector(dtype.itemsize), FIRST=first)
        if layout.v_first:
            constexprs |= dict(BLOCK_R=128, BLOCK_K=config.BLOCK)
        else:
            constexprs |= dict(WIDEST_ALIGNED=widths[0], WIDEST_UNALIGNED=widths[1], UPDATE=update, STAGE=config.BLOCK)
        return Launch(grid, config, dict(eps=eps), constexprs, needs)

    def needs() -> Needs:
        elements, rows, columns = layout.counts
        read, written = (rows, columns) if layout.v_first else (columns, rows)
        return Needs(
            flops=(4 if update else 2) * elements,
            bytes_read=elements * dtype.itemsize + 4 * read,
            bytes_written=4 * written + (size_of(buffers.partial) if update else 0),
        )

    launch(
        name_of("sweep", layout.v_first),
        _sweep_columns_kernel if layout.v_first else _sweep_kernel,
        dict(
            matrices_ptr=tables.matrices, addresses_ptr=addresses, items_ptr=tables.sweep,
            z_ptr=buffers.z, t_ptr=buffers.t, partial_ptr=buffers.partial, norms_ptr=buffers.norms,
        ),
        (grid, config, widths, dtype, eps, first, update),
        describe,
    )  # fmt: skip
