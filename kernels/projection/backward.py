"""Gradients of the projections: through the max-pool inside other kernels, through the convolutions as two products.

dq and the unpooled dk and dv lie side by side in one buffer G (B, N, 2 * D_QK + D_V), which attention's backward
kernels write. With W = [W_theta; W_phi; W_g], dx = dY + G W and dW = Gᵀ X are one matrix product each. The program
that owns a window writes all its positions, the gradient at the winner and zero elsewhere: no atomics, no second pass.
Oracle: autograd through reference.project.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tiles import load_rows, store_rows
from .forward import pixel_of


@triton.jit
def store_unpooled(
    grad, argmax_ptr, out_ptr,  # (BLOCK_M, BLOCK); pointers to the image's argmax (M, stride_a), output (N, stride_n)
    stride_a_m, stride_out_n,
    offs_m, mask_m, W,
    FIRST: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Store `grad`, of the windows `offs_m`, columns FIRST.. of D, at the position each winner had before the pool."""
    value = grad.to(out_ptr.dtype.element_ty)
    argmax = load_rows(argmax_ptr, stride_a_m, 1, offs_m, mask_m, FIRST, D, BLOCK)
    for j in range(4):  # not unrolled: the addresses of four windows do not fit in the registers
        offs_n = pixel_of(offs_m, j, W, W // 2, True)
        store_rows(out_ptr, stride_out_n, tl.where(argmax == j, value, 0.0), offs_n, mask_m, FIRST, D, BLOCK)


def projection_bwd_input(G: Tensor, weight: Tensor, d_y: Tensor, channels_last: bool) -> Tensor:
    """Return dx = d_y + G `weight`, (B, C, H, W) in the dtype and memory format of `d_y`.

    `G` (B, N, D) and `weight` (D, C) share a dtype; `d_y` (B, C, H, W), contiguous or `channels_last`, of any float
    dtype, is the gradient that comes past the block.
    """
    B, C, H, W = d_y.shape
    if channels_last:
        rows, flat = d_y.permute(0, 2, 3, 1).reshape(B * H * W, C), G.flatten(0, 1)
        d_x = torch.addmm(rows, flat, weight) if d_y.dtype == G.dtype else rows + flat @ weight
        return d_x.view(B, H, W, C).permute(0, 3, 1, 2)
    maps, columns = d_y.view(B, C, H * W), weight.T.expand(B, C, -1)
    if d_y.dtype == G.dtype:
        return torch.baddbmm(maps, columns, G.transpose(1, 2)).view(B, C, H, W)
    return (maps + torch.bmm(columns, G.transpose(1, 2))).view(B, C, H, W)


def product_in_float32(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b, (.., R, K), added up and left in float32 (float64 for float64).

    A sum of half-precision products may be too large for their dtype while what is made of it is not.
    """
    if a.dtype in (torch.float32, torch.float64):
        return a @ b
    if a.is_cuda and torch.version.hip is None:
        return torch.mm(a, b, out_dtype=torch.float32) if a.ndim == 2 else torch.bmm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def projection_bwd_weight(G: Tensor, x: Tensor, channels_last: bool) -> Tensor:
    """Return dW = sum over images and positions of Gᵀ x, (D, C), in float32 (float64 for float64).

    `G` (B, N, D); `x` (B, C, H, W), contiguous or `channels_last`, of any float dtype. The latter is one product over
    all positions; otherwise it is one an image, and their sum.
    """
    B, C, H, W = x.shape
    if channels_last:
        rows = x.permute(0, 2, 3, 1).reshape(B * H * W, C).to(G.dtype)
        return product_in_float32(G.flatten(0, 1).T, rows)
    maps = x.view(B, C, H * W).to(G.dtype)
    return product_in_float32(G.transpose(1, 2), maps.transpose(1, 2)).sum(0)
