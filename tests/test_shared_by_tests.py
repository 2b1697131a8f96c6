"""bfloat16 in Triton's interpreter, as shared_by_tests.py teaches it, is PyTorch's."""

import os

import pytest
import torch
import triton
import triton.language as tl

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="the interpreter's alone")
SIZE = 4096


@triton.jit
def _cast_kernel(wide_ptr, narrow_ptr, back_ptr, SIZE: tl.constexpr):
    offs = tl.arange(0, SIZE)
    narrow = tl.load(wide_ptr + offs).to(tl.bfloat16)
    tl.store(narrow_ptr + offs, narrow)
    tl.store(back_ptr + offs, narrow.to(tl.float32))


@triton.jit
def _arithmetic_kernel(a_ptr, b_ptr, out_ptr, SIZE: tl.constexpr):
    offs = tl.arange(0, SIZE)
    a = tl.load(a_ptr + offs)
    b = tl.load(b_ptr + offs, mask=offs < SIZE - 5, other=2.5)
    tl.store(out_ptr + offs, a + b)
    tl.store(out_ptr + SIZE + offs, a * b - a)
    tl.store(out_ptr + 2 * SIZE + offs, tl.maximum(a, -b))
    tl.store(out_ptr + 3 * SIZE + offs, tl.where(a < b, a, 0.5))


@triton.jit
def _product_kernel(a_ptr, b_ptr, out_ptr, SIZE: tl.constexpr):
    rows, columns = tl.arange(0, SIZE)[:, None] * SIZE, tl.arange(0, SIZE)[None, :]
    a, b = tl.load(a_ptr + rows + columns), tl.load(b_ptr + rows + columns)
    tl.store(out_ptr + rows + columns, tl.dot(a, tl.trans(b)))


def test_casts_round_to_the_nearest_as_pytorchs(generator):
    bits = torch.randint(-(2**31), 2**31, (SIZE,), generator=generator).to(torch.int32)
    bits[:8] = torch.tensor([0, -(2**31), 0x7F800000, -0x800000, 0x7FC00000, 1, 0x3F808000, 0x3F818000])  # ties, ends
    wide = bits.view(torch.float32)
    narrow, back = torch.empty(SIZE, dtype=torch.bfloat16), torch.empty(SIZE)
    _cast_kernel[1,](wide, narrow, back, SIZE=SIZE)
    torch.testing.assert_close(narrow, wide.bfloat16(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(back, wide.bfloat16().float(), rtol=0, atol=0, equal_nan=True)


def test_sums_and_choices_are_pytorchs(generator):
    a, b = (torch.randn(SIZE, generator=generator).bfloat16() for _ in range(2))
    out = torch.empty(4, SIZE, dtype=torch.bfloat16)
    _arithmetic_kernel[1,](a, b, out, SIZE=SIZE)
    b[-5:] = 2.5
    truth = torch.stack([a + b, a * b - a, torch.maximum(a, -b), torch.where(a < b, a, torch.full_like(a, 0.5))])
    assert torch.equal(out, truth)


def test_products_add_up_in_float32(generator):
    a, b = (torch.randn(64, 64, generator=generator).bfloat16() for _ in range(2))
    out = torch.empty(64, 64)
    _product_kernel[1,](a, b, out, SIZE=64)
    torch.testing.assert_close(out.double(), a.double() @ b.double().T, rtol=1e-5, atol=1e-5)
