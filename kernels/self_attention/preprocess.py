"""What the block's backward needs before attention's kernels: d_o, delta = rowsum(d_o * o), and d_gamma.

d_o = gamma * d_y W_o is stored, D_V wide, since every tile of keys reads it. Each program's share of
d_gamma = sum of (d_y W_o) * o is the same product. Products and sums accumulate in float32.
Grid: see kernels/tiles.py. Oracle: autograd through reference.self_attention.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import check_contiguous
from ..configs import LaunchConfig, lookup
from ..launch import Launch, Needs, accumulator_dtype, arch_of, launch, precision_of, size_of
from ..tiles import arithmetic, cdiv, grid_of, load_chunk, load_rows, load_weight, locate, split, store_rows, strides_of


@triton.jit
def round_as(values, ptr):
    """`values` as they are read back once stored at `ptr`."""
    return values.to(ptr.dtype.element_ty).to(values.dtype)


@triton.jit
def _bwd_preprocess_kernel(
    d_y_ptr, w_o_ptr, b_o_ptr,  # (B, C, N), (C, D_V) or None, (C,) or None
    o_ptr, lost_ptr, gamma_ptr,  # (B, N, D_V), the same or None, one element
    d_o_ptr, delta_ptr, d_gamma_ptr,  # (B, N, D_V), (B, N), (programs,)
    stride_d_y_b, stride_d_y_c, stride_d_y_n,
    N, C,
    D_V: tl.constexpr, EVEN_C: tl.constexpr, FLAT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D_V: tl.constexpr, BLOCK_REST: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    b, offs_n = locate(N, BLOCK_N, FLAT)
    mask_n = offs_n < N
    rows = b * N + offs_n
    d_y_tile = d_y_ptr + b * stride_d_y_b
    through_bias = tl.zeros((BLOCK_N,), ACC)
    if w_o_ptr is not None:
        d_y_tile += offs_n[:, None].to(tl.int64) * stride_d_y_n
        d_o = tl.zeros((BLOCK_N, BLOCK_D_V), ACC)
        if BLOCK_REST > 0:
            d_rest = tl.zeros((BLOCK_N, BLOCK_REST), ACC)
        for start_c in tl.range(0, C, BLOCK_C):
            c = start_c + tl.arange(0, BLOCK_C)
            mask_c = (c < C) | EVEN_C
            d_y = load_chunk(d_y_tile, stride_d_y_c, c.to(tl.int64), mask_c, mask_n)
            w = load_weight(w_o_ptr, D_V, 1, c, mask_c, 0, D_V, BLOCK_D_V)
            d_o = tl.dot(d_y.to(w.dtype), w, d_o, input_precision=PRECISION, out_dtype=ACC)
            if BLOCK_REST > 0:
                w = load_weight(w_o_ptr, D_V, 1, c, mask_c, BLOCK_D_V, D_V, BLOCK_REST)
                d_rest = tl.dot(d_y.to(w.dtype), w, d_rest, input_precision=PRECISION, out_dtype=ACC)
            if b_o_ptr is not None:
                b_o = tl.load(b_o_ptr + c, mask=mask_c, other=0.0)
                through_bias += tl.sum(d_y.to(ACC) * b_o[None, :].to(ACC), 1)
    else:
        d_o = load_rows(d_y_tile, stride_d_y_n, stride_d_y_c, offs_n, mask_n, 0, D_V, BLOCK_D_V).to(ACC)
        if BLOCK_REST > 0:
            d_rest = load_rows(d_y_tile, stride_d_y_n, stride_d_y_c, offs_n, mask_n, BLOCK_D_V, D_V, BLOCK_REST).to(ACC)
    o = load_rows(o_ptr, D_V, 1, rows, mask_n, 0, D_V, BLOCK_D_V).to(ACC)
    if lost_ptr is not None:
        o += load_rows(lost_ptr, D_V, 1, rows, mask_n, 0, D_V, BLOCK_D_V).to(ACC)
    if BLOCK_REST > 0:
        o_rest = load_rows(o_ptr, D_V, 1, rows, mask_n, BLOCK_D_V, D_V, BLOCK_REST).to(ACC)
        if lost_ptr is not None:
            o_rest += load_rows(lost_ptr, D_V, 1, rows, mask_n, BLOCK_D_V, D_V, BLOCK_REST).to(ACC)
    through_o = tl.sum(d_o * o, 1)
    gamma = tl.load(gamma_ptr).to(ACC)
    d_o = round_as(d_o * gamma, d_o_ptr)  # delta belongs to d_o as the products d_o vᵀ read it
    store_rows(d_o_ptr, D_V, d_o, rows, mask_n, 0, D_V, BLOCK_D_V)
    if BLOCK_REST > 0:
        through_o += tl.sum(d_rest * o_rest, 1)
        d_rest = round_as(d_rest * gamma, d_o_ptr)
        store_rows(d_o_ptr, D_V, d_rest, rows, mask_n, BLOCK_D_V, D_V, BLOCK_REST)
    program = tl.program_id(0) if FLAT else b * tl.num_programs(0) + tl.program_id(0)
    # along all axes: on what tcgen05 products gave, Triton 3.6 fails to compile it along axis 0
    tl.store(d_gamma_ptr + program, tl.sum(through_o + through_bias))
    delta = tl.sum(d_o * o, 1)
    if BLOCK_REST > 0:
        delta += tl.sum(d_rest * o_rest, 1)
    tl.store(delta_ptr + rows, delta, mask=mask_n)


def block_bwd_preprocess(
    d_y: Tensor,
    w_o: Tensor | None,
    b_o: Tensor | None,
    o: Tensor,
    lost: Tensor | None,
    gamma: Tensor,
    *,
    config: LaunchConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return d_o like `o` (B, N, D_V), delta (B, N) and d_gamma (), the last two float32.

    `d_y` (B, C, H, W), contiguous or channels_last, of any float dtype; `o` and `lost` as in `Saved`, `w_o` (C, D_V)
    and `b_o` (C,) as in `self_attention_fwd`.
    """
    check_contiguous("block_bwd_preprocess", ("o", "lost", "w_o", "b_o"), (o, lost, w_o, b_o))
    (B, N, D_V), C = o.shape, o.shape[2] if w_o is None else w_o.shape[0]
    precision = precision_of(o.dtype)
    chosen = config or lookup("attention_bwd_preprocess", arch_of(o), precision, 1, D_V)
    grid, acc_dtype = grid_of(cdiv(N, chosen.BLOCK_N), B), accumulator_dtype(o.dtype)
    d_o, delta = torch.empty_like(o), torch.empty((B, N), device=o.device, dtype=acc_dtype)
    d_gamma = torch.empty((cdiv(N, chosen.BLOCK_N) * B,), device=o.device, dtype=acc_dtype)
    strides = strides_of(d_y)

    def describe() -> Launch:
        width, rest = split(D_V)
        return Launch(
            grid,
            chosen,
            dict(
                stride_d_y_b=strides[0], stride_d_y_c=strides[1], stride_d_y_n=strides[2],
                N=N, C=C,
            ),
            dict(
                D_V=D_V, EVEN_C=C % chosen.BLOCK_C == 0, FLAT=len(grid) == 1,
                BLOCK_N=chosen.BLOCK_N, BLOCK_C=chosen.BLOCK_C, BLOCK_D_V=width, BLOCK_REST=rest,
                **arithmetic(precision, chosen),
            ),
            lambda: Needs(
                flops=2 * B * N * D_V * (1 if w_o is None else C + 1),
                bytes_read=size_of(d_y, w_o, b_o, o, lost, gamma),
                bytes_written=size_of(d_o, delta, d_gamma),
            ),
        )  # fmt: skip

    tensors = dict(
        d_y_ptr=d_y, w_o_ptr=w_o, b_o_ptr=b_o, o_ptr=o, lost_ptr=lost, gamma_ptr=gamma,
        d_o_ptr=d_o, delta_ptr=delta, d_gamma_ptr=d_gamma,
    )  # fmt: skip
    key = (B, N, C, D_V, strides, precision, config)
    launch("self_attention_bwd_preprocess", _bwd_preprocess_kernel, tensors, key, describe)
    return d_o, delta, d_gamma.sum()
