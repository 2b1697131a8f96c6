"""Lists of matrices and of stacks of matrices, such as the experts of a layer: their tables, one entry a matrix.

A stack (E, R, ...) is E matrices at equal distances. The host knows its address alone, so that a thousand experts cost
it no more than one: `_expand_kernel` writes the addresses of all matrices from those of the stacks.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..configs import LaunchConfig
from ..launch import Launch, Needs, launch
from .addresses import addresses_of
from .tables import MAX_TABLES, Shape, Tables, column_groups, first_of, is_capturing, tables_of, vector

_CONFIG = LaunchConfig(BLOCK=1024, num_warps=4, num_stages=3)


class Stack(NamedTuple):
    """`number` matrices R x K of `itemsize` bytes an element, one behind the other; columns stored as S groups of C.

    `start` is the address of the first modulo 16.
    """

    number: int
    R: int
    K: int
    C: int
    S: int
    start: int
    itemsize: int

    def shapes(self) -> list[Shape]:
        """Return the shape of each matrix."""
        wide = vector(self.itemsize)
        found = []
        for index in range(self.number):
            starts = (self.start + index * self.R * self.K * self.itemsize) % 16 == 0
            found.append(Shape(self.R, self.K, self.C, self.S, starts and self.K % wide == 0, starts))
        return found


def stack_of(tensor: Tensor, is_stack: bool) -> Stack:
    """Return what the kernels know about a dense `tensor`."""
    matrix = first_of(tensor, is_stack)
    C, S = column_groups(matrix)
    count = tensor.shape[0] if is_stack else 1
    return Stack(count, matrix.shape[0], C * S, C, S, tensor.data_ptr() % 16, tensor.element_size())


class Stacked(NamedTuple):
    """The tables of all matrices, and where each is: `places` int64 (L, 4), its stack and the bytes to its W, u, v.

    None where no stack has more than one matrix.
    """

    tables: Tables
    places: Tensor | None


_captured: dict[tuple[object, ...], Stacked] = {}
"""Kept for good: CUDA graphs read them at every replay."""


def stacked_tables(tensors: Sequence[Tensor], are_stacks: Sequence[bool], v_first: bool) -> Stacked:
    """Return the tables of `tensors`; they are uploaded the first time that a device sees such a list.

    Raises RuntimeError if that is while a CUDA graph is captured.
    """
    key = tuple(map(stack_of, tensors, are_stacks)), v_first, tensors[0].device
    found = _stacked(*key)
    if is_capturing(tensors[0].device):
        _captured[key] = found
    return found


@functools.lru_cache(maxsize=MAX_TABLES)
def _stacked(stacks: tuple[Stack, ...], v_first: bool, device: torch.device) -> Stacked:
    tables = tables_of(tuple(shape for stack in stacks for shape in stack.shapes()), v_first, device)
    if all(stack.number == 1 for stack in stacks):
        return Stacked(tables, None)
    rows = []
    for index, stack in enumerate(stacks):
        steps = stack.R * stack.K * stack.itemsize, 4 * stack.R, 4 * stack.K
        rows += [(index, *(place * step for step in steps)) for place in range(stack.number)]
    return Stacked(tables, torch.tensor(rows, dtype=torch.int64).to(device))


@triton.jit
def _expand_kernel(
    table_ptr, stacks_ptr, places_ptr,  # (L, 3), (stacks, 3), (L, 4), all int64
    size, BLOCK: tl.constexpr,
):  # fmt: skip
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    place_ptr = places_ptr + offs // 3 * 4
    stack = tl.load(place_ptr, mask=mask, other=0)
    address = tl.load(stacks_ptr + stack * 3 + offs % 3, mask=mask, other=0)
    tl.store(table_ptr + offs, address + tl.load(place_ptr + 1 + offs % 3, mask=mask, other=0), mask=mask)


def stacked_addresses(
    stacked: Stacked, tensors: Sequence[Tensor], us: Sequence[Tensor | None], vs: Sequence[Tensor | None]
) -> Tensor:
    """Return the table (L, 3) of the addresses of all matrices and of their u and v, float32 and contiguous."""
    stacks, places = addresses_of(tensors, us, vs), stacked.places
    if places is None:
        return stacks
    table = torch.empty((len(places), 3), device=places.device, dtype=torch.int64)
    grid = (triton.cdiv(table.numel(), _CONFIG.BLOCK),)
    needs = Needs(bytes_read=56 * len(places), bytes_written=24 * len(places))
    launch(
        "spectral_norm addresses of stacks",
        _expand_kernel,
        dict(table_ptr=table, stacks_ptr=stacks, places_ptr=places),
        (table.numel(),),
        lambda: Launch(grid, _CONFIG, dict(size=table.numel()), dict(BLOCK=_CONFIG.BLOCK), lambda: needs),
    )
    return table
