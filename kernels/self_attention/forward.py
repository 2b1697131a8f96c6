"""y = x + gamma * o(softmax(q kᵀ) v): the whole self-attention block in two launches.

`projection_fwd` makes q, k and v from x. The second launch attends, and its epilogue computes
y = x + W_o (gamma * o) + gamma * b_o over C in chunks: o need not go to memory, and y is written once. What is added to
x is rounded to its dtype first. Grid: see kernels/tiles.py; a program owns BLOCK_N queries of one image.
Oracle: reference.self_attention.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import LOG2_E
from ..attention.forward import attend
from ..checks import check_contiguous
from ..configs import LaunchConfig, lookup
from ..launch import Launch, Needs, accumulator_dtype, arch_of, launch, precision_of, size_of
from ..projection.forward import projection_fwd
from ..tiles import (
    arithmetic,
    cdiv,
    grid_of,
    is_channels_last,
    load_rows,
    load_weight_t,
    locate,
    padded,
    split,
    store_lost,
    store_rows,
    strides_of,
)
from .inputs import BlockInputs, Saved


@triton.jit
def _fwd_kernel(
    x_ptr, q_ptr, k_ptr, v_ptr,  # (B, C, N), (B, N, D_QK), (B, M, D_QK), (B, M, D_V)
    w_o_ptr, b_o_ptr, gamma_ptr, y_ptr,  # (C, D_V) or None, (C,) or None, one element, (B, C, N)
    o_ptr, lse_ptr, lost_ptr,  # (B, N, D_V), (B, N), (B, N, D_V); None where backward needs none
    stride_x_b, stride_x_c, stride_x_n,  # and of y
    N, M, C,
    D_QK: tl.constexpr, D_V: tl.constexpr, EVEN_N: tl.constexpr, EVEN_M: tl.constexpr, EVEN_C: tl.constexpr,
    LOG2_E: tl.constexpr, FLAT: tl.constexpr, SUM_BY_PRODUCT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_D_QK: tl.constexpr, BLOCK_D_V: tl.constexpr, BLOCK_REST: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    dtype = k_ptr.dtype.element_ty
    b, offs_n = locate(N, BLOCK_N, FLAT)
    offs_c = tl.arange(0, BLOCK_C)
    mask_n = (offs_n < N) | EVEN_N
    rows = b * N + offs_n
    x_tile = x_ptr + b * stride_x_b + offs_n[:, None] * stride_x_n
    y_tile = y_ptr + b * stride_x_b + offs_n[:, None] * stride_x_n

    q = load_rows(q_ptr + b * N * D_QK, D_QK, 1, offs_n, mask_n, 0, D_QK, BLOCK_D_QK)
    offs_qk = tl.arange(0, BLOCK_D_QK)
    unit = (offs_qk[:, None] == offs_qk[None, :]).to(dtype)
    q = tl.dot(q, unit, input_precision=PRECISION, out_dtype=ACC).to(dtype)
    out, rest, row_max, row_sum = attend(
        q, k_ptr + b * M * D_QK, v_ptr + b * M * D_V, D_QK, 1, D_V, 1,
        M, LOG2_E, D_QK, D_V, EVEN_M, SUM_BY_PRODUCT,
        BLOCK_N, BLOCK_M, BLOCK_D_QK, BLOCK_D_V, BLOCK_REST, PRECISION, ACC,
    )  # fmt: skip
    inverse = 1.0 / row_sum
    if o_ptr is not None:
        store_rows(o_ptr, D_V, out * inverse[:, None], rows, mask_n, 0, D_V, BLOCK_D_V)
        if lost_ptr is not None:
            store_lost(lost_ptr, D_V, out * inverse[:, None], rows, mask_n, 0, D_V, BLOCK_D_V)
        if BLOCK_REST > 0:
            store_rows(o_ptr, D_V, rest * inverse[:, None], rows, mask_n, BLOCK_D_V, D_V, BLOCK_REST)
            if lost_ptr is not None:
                store_lost(lost_ptr, D_V, rest * inverse[:, None], rows, mask_n, BLOCK_D_V, D_V, BLOCK_REST)
        tl.store(lse_ptr + rows, row_max + tl.log2(row_sum), mask=mask_n)

    gamma = tl.load(gamma_ptr).to(ACC)
    out *= (inverse * gamma)[:, None]
    rest *= (inverse * gamma)[:, None]
    if w_o_ptr is not None:
        o = out.to(dtype)
        o_rest = rest.to(dtype)
        for start_c in tl.range(0, C, BLOCK_C):
            c = start_c + offs_c
            mask_c = (c < C) | EVEN_C
            w = load_weight_t(w_o_ptr, D_V, c, mask_c, 0, D_V, BLOCK_D_V)
            if BLOCK_REST > 0:
                w_rest = load_weight_t(w_o_ptr, D_V, c, mask_c, BLOCK_D_V, D_V, BLOCK_REST)
            y = tl.dot(o, w, input_precision=PRECISION, out_dtype=ACC)
            if BLOCK_REST > 0:
                y = tl.dot(o_rest, w_rest, y, input_precision=PRECISION, out_dtype=ACC)
            if b_o_ptr is not None:
                y += tl.load(b_o_ptr + c, mask=mask_c, other=0.0)[None, :] * gamma
            add_residual(x_tile, y_tile, stride_x_c, y.to(x_ptr.dtype.element_ty), c, mask_c, mask_n)
    else:
        add_columns(x_tile, y_tile, stride_x_c, out, mask_n, 0, D_V, BLOCK_D_V)
        if BLOCK_REST > 0:
            add_columns(x_tile, y_tile, stride_x_c, rest, mask_n, BLOCK_D_V, D_V, BLOCK_REST)


@triton.jit
def add_residual(x_tile, y_tile, stride_c, value, c, mask_c, mask_n):
    """Store x + `value` (BLOCK_N, BLOCK_C) at channels `c` of the positions at `y_tile` (BLOCK_N, 1)."""
    offs = c[None, None, :] * stride_c
    mask = mask_n[:, None, None] & mask_c[None, None, :]
    y = tl.load(x_tile[:, None, :] + offs, mask=mask, other=0.0) + value[:, None, :]
    tl.store(y_tile[:, None, :] + offs, y, mask=mask)


@triton.jit
def add_columns(x_tile, y_tile, stride_c, value, mask_n, FIRST: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    """The same at the BLOCK channels from FIRST on, of D."""
    c = FIRST + tl.arange(0, BLOCK)
    add_residual(x_tile, y_tile, stride_c, value.to(x_tile.dtype.element_ty), c, c < D, mask_n)


def self_attention_fwd(inputs: BlockInputs, *, pool: bool, save: bool = True) -> tuple[Tensor, Saved | None]:
    """Return y, (B, C, H, W) with the strides and dtype of x, and with `save` what backward needs, else None.

    x is contiguous or channels_last, of any float dtype. The weights are contiguous matrices of one dtype, in which
    products are computed; the biases share it. gamma may have any float dtype.
    """
    x, w_theta, w_phi, w_g, w_o, gamma, b_theta, b_phi, b_g, b_o = inputs
    q, k, v, argmax = projection_fwd(x, w_theta, w_phi, w_g, b_theta, b_phi, b_g, pool=pool, save=save)
    y, o, lse, lost = block_fwd(x, q, k, v, w_o, gamma, b_o, save=save)
    return y, None if o is None or lse is None else Saved(q, k, v, o, lse, lost, argmax)


_DENSE = ("q", "k", "v", "w_o", "b_o")


def block_fwd(
    x: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w_o: Tensor | None,
    gamma: Tensor,
    b_o: Tensor | None = None,
    *,
    save: bool = True,
    config: LaunchConfig | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Return y = x + gamma * (W_o softmax(q kᵀ) v + b_o), and with `save` the o, lse and lost of `Saved`.

    x, the weights and gamma as in `self_attention_fwd`; `q` (B, N, D_QK), `k` (B, M, D_QK) and `v` (B, M, D_V) are
    contiguous. gamma is read by the kernel.
    """
    check_contiguous("block_fwd", _DENSE, (q, k, v, w_o, b_o))
    (B, C), (_, N, D_QK), (_, M, D_V) = x.shape[:2], q.shape, v.shape
    y = torch.empty_like(x)
    precision = precision_of(k.dtype)
    o = lse = lost = None
    if save:
        o = torch.empty((B, N, D_V), device=x.device, dtype=k.dtype)
        lse = torch.empty((B, N), device=x.device, dtype=accumulator_dtype(k.dtype))
        lost = torch.empty_like(o) if k.dtype != lse.dtype else None

    def describe() -> Launch:
        chosen = config or lookup("attention_fwd", arch_of(x), precision, D_QK, D_V, N)
        grid, (width, rest) = grid_of(cdiv(N, chosen.BLOCK_N), B), split(D_V)
        stride_b, stride_c, stride_n = strides_of(x)
        return Launch(
            grid,
            chosen,
            dict(
                stride_x_b=stride_b, stride_x_c=stride_c, stride_x_n=stride_n,
                N=N, M=M, C=C,
            ),
            dict(
                D_QK=D_QK, D_V=D_V, EVEN_N=N % chosen.BLOCK_N == 0, EVEN_M=M % chosen.BLOCK_M == 0,
                EVEN_C=C % chosen.BLOCK_C == 0, LOG2_E=LOG2_E, FLAT=len(grid) == 1,
                SUM_BY_PRODUCT=chosen.sum_by_product,
                BLOCK_N=chosen.BLOCK_N, BLOCK_M=chosen.BLOCK_M, BLOCK_C=chosen.BLOCK_C,
                BLOCK_D_QK=padded(D_QK), BLOCK_D_V=width, BLOCK_REST=rest,
                **arithmetic(precision, chosen),
            ),
            lambda: Needs(
                flops=2 * B * N * (M * (D_QK + D_V) + (0 if w_o is None else C * D_V)),
                exps=B * N * M,
                bytes_read=size_of(x, q, k, v, w_o, b_o, gamma),
                bytes_written=size_of(y, o, lse, lost),
            ),
        )  # fmt: skip

    tensors = dict(
        x_ptr=x, q_ptr=q, k_ptr=k, v_ptr=v,
        w_o_ptr=w_o, b_o_ptr=b_o, gamma_ptr=gamma, y_ptr=y, o_ptr=o, lse_ptr=lse, lost_ptr=lost,
    )  # fmt: skip
    launch(
        "self_attention_fwd",
        _fwd_kernel,
        tensors,
        (x.shape, is_channels_last(x), M, D_QK, D_V, precision, config),
        describe,
    )
    return y, o, lse, lost
