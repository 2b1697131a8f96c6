"""The projections' gradients as two products, and the scatter through the pool, against autograd in float64."""

import pytest
import torch
import triton
import triton.language as tl

from sagan_fast.kernels.projection.backward import projection_bwd_input, projection_bwd_weight, store_unpooled
from shared_by_tests import assert_close_to_truth, randn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def _unpool_kernel(grad_ptr, argmax_ptr, out_ptr, M, W, BLOCK_M: tl.constexpr, D: tl.constexpr):
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, D)
    mask = (offs_m < M)[:, None] & (offs_d < D)[None, :]
    grad = tl.load(grad_ptr + offs_m[:, None] * D + offs_d[None, :], mask=mask, other=0.0)
    store_unpooled(grad, argmax_ptr, out_ptr, D, D, offs_m, offs_m < M, W, 0, D, D)


@pytest.mark.parametrize("H, W", [(8, 8), (4, 14), (9, 7), (2, 2)])
def test_gradients_go_where_the_maximum_was(H, W, generator):
    D, M = 16, (H // 2) * (W // 2)
    maps = randn(1, D, H, W, generator=generator, dtype=torch.float32).requires_grad_()
    pooled, flat = torch.nn.functional.max_pool2d(maps, 2, return_indices=True)
    d_pooled = randn(1, D, H // 2, W // 2, generator=generator, dtype=torch.float32)
    pooled.backward(d_pooled)
    argmax = (flat // W % 2 * 2 + flat % W % 2).to(torch.uint8)
    rows, argmax = (t[0].flatten(1).T.contiguous().to(DEVICE) for t in (d_pooled, argmax))
    out = torch.zeros(H * W, D, device=DEVICE)
    _unpool_kernel[(triton.cdiv(M, 8),)](rows, argmax, out, M, W, BLOCK_M=8, D=D)
    assert torch.equal(out.cpu(), maps.grad[0].flatten(1).T)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(2, 24, 6, 5), (1, 8, 4, 1), (0, 8, 4, 4)], ids=str)
def test_two_products_are_the_convolutions_gradients(shape, x_dtype, channels_last, generator):
    B, C, H, W = shape
    D = 11
    x, d_y = (randn(*shape, generator=generator).to(DEVICE, x_dtype) for _ in range(2))
    if channels_last:
        x, d_y = (t.contiguous(memory_format=torch.channels_last) for t in (x, d_y))
    weight = randn(D, C, generator=generator, scale=C**-0.5).to(DEVICE, torch.float16)
    G = randn(B, H * W, D, generator=generator).to(DEVICE, torch.float16)
    exact_x, exact_w = x.double().requires_grad_(), weight.double()[:, :, None, None].requires_grad_()
    conv = torch.nn.functional.conv2d(exact_x, exact_w)
    d_conv = G.double().transpose(1, 2).reshape(B, D, H, W)
    d_x, d_w = torch.autograd.grad((conv * d_conv).sum() + (exact_x * d_y.double()).sum(), (exact_x, exact_w))
    found = projection_bwd_input(G, weight, d_y, channels_last)
    assert found.dtype == x_dtype and found.stride() == d_y.stride()
    assert_close_to_truth("d_x", found, d_x, precision="fp16")
    found = projection_bwd_weight(G, x, channels_last)
    assert found.dtype == torch.float32  # of products whose inputs are half precision
    assert_close_to_truth("d_w", found, d_w[:, :, 0, 0], precision="fp16")
