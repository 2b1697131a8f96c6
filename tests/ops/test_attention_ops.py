"""The ops behind attention do what their schemas and their shapes under torch.compile say."""

import os

import pytest
import torch
from torch.library import opcheck

from sagan_fast.kernels.attention import reference
from sagan_fast.ops import attention_ops
from shared_by_tests import randn

needs_interpreter = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="on the CPU the Triton kernels need TRITON_INTERPRET=1"
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("chosen", ["cpu", pytest.param("triton", marks=needs_interpreter)])
def test_ops_pass_opcheck(chosen, dtype, generator):
    sizes = ((2, 20, 3), (2, 12, 3), (2, 12, 7), (2, 20, 7))
    q, k, v, d_out, *tangents = (randn(*size, generator=generator).to(dtype) for size in (*sizes, *sizes[:3]))
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    ops = torch.ops.sagan_fast

    def check(op, arguments):
        # chunks are never compiled, so nobody asks for the strides of their results
        opcheck(op.default, arguments, test_utils=["test_schema", "test_faketensor"][: 1 + (chosen == "triton")])

    for save in (True, False) if chosen == "triton" else (True,):
        check(ops.attention, (q, k, v, 0.5, save, chosen))
    saved = ops.attention(q, k, v, 0.5, True, chosen)
    assert saved[2].shape == (2, 20, 7 if dtype == torch.float16 else 0)
    check(ops.attention_gradients, (d_out, q, k, v, *saved, 0.5, chosen))
    check(ops.attention_tangent, (q, k, v, *saved, *tangents, 0.5, chosen))
    check(ops.attention_second, (d_out, q, k, v, *saved, *tangents, 0.5, chosen))


def test_what_rounding_took_is_whole_again(generator):
    q, k, v = (randn(1, 9, 4, generator=generator).half() for _ in range(3))
    out, _, lost = torch.ops.sagan_fast.attention(q, k, v, 1.0, True, "cpu")
    exact = torch.softmax(q.double() @ k.double().mT, -1) @ v.double()
    whole = attention_ops._whole(out, lost).double()
    assert (whole - exact).norm() <= 1e-5 * exact.norm() < 1e-1 * (out.double() - exact).norm()


@needs_interpreter
@pytest.mark.parametrize(
    ("dtype", "D_V", "by"), [("float32", 128, "triton"), ("float32", 130, "cpu"), ("float16", 130, "triton")]
)
def test_second_gradients_of_wide_float32_are_made_in_chunks(dtype, D_V, by, generator):
    sizes = ((1, 20, 3), (1, 12, 3), (1, 12, D_V), (1, 20, D_V))
    q, k, v, d_out, *tangents = (
        randn(*size, generator=generator).to(getattr(torch, dtype)) for size in (*sizes, *sizes[:3])
    )
    ops = torch.ops.sagan_fast
    saved = ops.attention(q, k, v, 0.5, True, "triton")
    assert attention_ops._second_by("triton", q, v) == by
    found = ops.attention_second(d_out, q, k, v, *saved, *tangents, 0.5, "triton")
    exact = reference.attention_second(*(t.double() for t in (d_out, q, k, v, *tangents)), 0.5)
    for ours, right in zip(found, exact, strict=True):
        assert ours.dtype == q.dtype
        assert (ours.double() - right).norm() <= (1e-5 if dtype == "float32" else 5e-3) * right.norm()
