"""The backward kernels in the interpreter (on a GPU where there is one) against autograd through the reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.accuracy import rel_rms
from sagan_fast.kernels.attention.backward import attention_bwd
from sagan_fast.kernels.attention.forward import attention_fwd
from sagan_fast.kernels.attention.reference import attention
from shared_by_tests import assert_close_to_truth, assert_gradient, attention_terms, randn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [  # B, N, M, D_QK, D_V
    (2, 64, 64, 8, 32),
    (1, 150, 70, 12, 48),
    (1, 33, 65, 3, 5),
    (2, 1, 1, 1, 1),
    (1, 40, 33, 20, 160),
    (1, 70, 20, 33, 192),
    (1, 20, 40, 64, 256),
    (0, 16, 16, 8, 32),
]


def qkv(shape, generator, dtype):
    """q, k, v and the output's gradient; logits of a standard deviation of 1."""
    B, N, M, D_QK, D_V = shape
    sizes = ((B, N, D_QK), (B, M, D_QK), (B, M, D_V), (B, N, D_V))
    spreads = (D_QK**-0.25, D_QK**-0.25, 1.0, 1.0)
    return [randn(*s, generator=generator, scale=c).to(DEVICE, dtype) for s, c in zip(sizes, spreads, strict=True)]


def exact_gradients(q, k, v, d_out, scale=1.0, dtype=torch.float64):
    leaves = [t.detach().to(dtype).requires_grad_() for t in (q, k, v)]
    return torch.autograd.grad(attention(*leaves, scale), leaves, d_out.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_gradients_match_float64(shape, dtype, generator):
    q, k, v, d_out = qkv(shape, generator, dtype)
    out, lse, lost = attention_fwd(q, k, v)
    truths, eagers = exact_gradients(q, k, v, d_out), exact_gradients(q, k, v, d_out, dtype=dtype)
    found = attention_bwd(d_out, q, k, v, out, lse, lost)
    for name, grad, truth, eager in zip(("dq", "dk", "dv"), found, truths, eagers, strict=True):
        assert grad.dtype == dtype and grad.is_contiguous()
        if shape[2] > 1:  # with one key dq and dk are zero but for rounding
            assert_gradient(name, grad, truth, eager)


@settings(max_examples=8, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 2), *(st.integers(2, high) for high in (80, 80, 40, 50))),
    scale=st.sampled_from([1.0, 0.25, -0.5]),
    order=st.permutations([0, 1, 2]),
    seed=st.integers(0, 2**31),
)
def test_any_shape_scale_and_strides(shape, scale, order, seed):
    inverse = [order.index(axis) for axis in range(3)]
    tensors = qkv(shape, torch.Generator().manual_seed(seed), torch.float32)
    truths = exact_gradients(*tensors, scale)
    q, k, v, d_out = (t.permute(order).contiguous().permute(inverse) for t in tensors)
    found = attention_bwd(d_out, q, k, v, *attention_fwd(q, k, v, scale), scale)
    _, *terms = attention_terms(*tensors, scale)
    for name, grad, truth, added in zip(("dq", "dk", "dv"), found, truths, terms, strict=True):
        assert_close_to_truth(name, grad, truth, terms=added)


@pytest.mark.parametrize("M", [64, 50])
def test_log_sum_exps_near_minus_120_give_finite_gradients(M, generator):
    """Where a ragged tile's exp2(0 - lse) overflows, and where cuDNN returned NaN (pytorch#196678)."""
    q, k, v, d_out = qkv((2, 70, M, 15, 8), generator, torch.float32)
    q = torch.cat([q, torch.full_like(q[..., :1], -15)], 2)
    k = torch.cat([k, torch.full_like(k[..., :1], 8)], 2)
    out, lse, lost = attention_fwd(q, k, v)
    found = attention_bwd(d_out, q, k, v, out, lse, lost)
    for grad, truth in zip(found, exact_gradients(q, k, v, d_out), strict=True):
        assert rel_rms(grad, truth) <= 2 * 120 * 2**-24  # float32 rounds such a logit, so all it weights, by half of it
