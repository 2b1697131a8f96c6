"""The forward kernel in the interpreter (on a GPU where there is one) against the reference in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.accuracy import DTYPE_NAMES
from sagan_fast.kernels.attention.forward import attention_fwd
from sagan_fast.kernels.attention.reference import attention
from sagan_fast.kernels.configs import LaunchConfig
from shared_by_tests import assert_close_to_truth, attention_terms, randn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [  # B, N, M, D_QK, D_V
    (2, 64, 64, 8, 32),
    (1, 150, 70, 12, 48),
    (1, 130, 129, 24, 96),
    (1, 33, 65, 3, 5),
    (2, 1, 1, 1, 1),
    (1, 40, 33, 20, 160),
    (1, 70, 20, 33, 192),
    (1, 20, 40, 64, 256),
    (0, 16, 16, 8, 32),
]


def qkv(shape, generator, dtype):
    B, N, M, D_QK, D_V = shape
    sizes = ((B, N, D_QK), (B, M, D_QK), (B, M, D_V))
    spread = (2.0 / D_QK**0.5) ** 0.5  # logits of a standard deviation of 2
    q, k, v = (randn(*size, generator=generator).to(DEVICE) for size in sizes)
    return (q * spread).to(dtype), (k * spread).to(dtype), v.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_and_its_log_sum_exp_match_float64(shape, dtype, generator):
    q, k, v = qkv(shape, generator, dtype)
    out, lse, _ = attention_fwd(q, k, v)
    exact = [t.double() for t in (q, k, v)]
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert_close_to_truth("out", out, attention(*exact), attention(q, k, v))
    # of half-precision weights the sum may be that of the rounded ones, by which the output is divided; the sum, as its
    # logarithm may be near zero
    share = torch.exp(lse.double() * np.log(2) - torch.logsumexp(exact[0] @ exact[1].mT, 2))
    assert_close_to_truth("sum over the true one", share, torch.ones_like(share), precision=DTYPE_NAMES[dtype])


@settings(max_examples=12, deadline=None)
@given(
    shape=st.tuples(*(st.integers(1, high) for high in (2, 80, 80, 40, 50))),
    scale=st.sampled_from([1.0, 0.25, -0.5, 0.0]),
    order=st.permutations([0, 1, 2]),
    seed=st.integers(0, 2**31),
)
def test_any_shape_scale_and_strides(shape, scale, order, seed):
    inverse = [order.index(axis) for axis in range(3)]
    tensors = qkv(shape, torch.Generator().manual_seed(seed), torch.float32)
    strided = [t.permute(order).contiguous().permute(inverse) for t in tensors]
    truth = attention(*(t.double() for t in tensors), scale)
    terms, *_ = attention_terms(*tensors, truth, scale)
    assert_close_to_truth("out", attention_fwd(*strided, scale, save=False)[0], truth, terms=terms)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("level", [-120.0, 120.0])
@pytest.mark.parametrize("M", [64, 50])
def test_logits_far_from_zero(M, level, dtype, generator):
    """Log-sum-exps near -120, where exp underflows float32: the rows are those of the logits shifted to zero."""
    q, k, v = qkv((2, 70, M, 15, 8), generator, dtype)
    q = torch.cat([q, torch.full_like(q[..., :1], level / 8)], 2)
    k = torch.cat([k, torch.full_like(k[..., :1], 8)], 2)
    out, lse, _ = attention_fwd(q, k, v)
    assert_close_to_truth("out", out, attention(q.double(), k.double(), v.double()))
    assert (lse.sign() == np.sign(level)).all() and 100 < lse.abs().min() * np.log(2) < 140


@pytest.mark.parametrize("sum_by_product", [False, True])
@pytest.mark.parametrize("level", [-1.2e7, -8e6, -4.3e6, 4.3e6])
def test_maxima_that_move_by_a_fraction_where_logits_are_in_the_millions(level, sum_by_product, generator):
    """To base 2, where float32 still has halves: each tile of 16 keys is half a unit above the one before."""
    q = torch.ones(1, 40, 16, device=DEVICE)
    k = torch.zeros(1, 64, 16, device=DEVICE)
    k[..., 0] = level + 0.5 * torch.arange(64, device=DEVICE).div(16, rounding_mode="floor")
    v = randn(1, 64, 8, generator=generator).to(DEVICE, torch.float32)
    config = LaunchConfig(BLOCK_N=32, BLOCK_M=16, num_warps=4, sum_by_product=sum_by_product)
    scale = float(np.log(2))
    for keys, values in ((k, v), (k.flip(1), v.flip(1))):
        out, *_ = attention_fwd(q, keys, values, scale, config=config)
        assert_close_to_truth("out", out, attention(q.double(), keys.double(), values.double(), scale))


def test_equal_keys_give_the_mean_of_the_values(generator):
    q, k, v = qkv((1, 40, 60, 8, 16), generator, torch.float32)
    out, *_ = attention_fwd(q, k[:, :1].expand_as(k), v)
    assert_close_to_truth("out", out, v.double().mean(1, keepdim=True).expand(1, 40, 16))


def test_no_keys_give_zero(generator):
    q, k, v = qkv((2, 5, 3, 4, 6), generator, torch.float32)
    out, lse, _ = attention_fwd(q, k[:, :0], v[:, :0])
    assert out.eq(0).all() and lse.eq(-torch.inf).all()


def test_nan_stays_in_its_row(generator):
    q, k, v = qkv((1, 70, 70, 8, 16), generator, torch.float32)
    q[0, 3] = torch.nan
    out, *_ = attention_fwd(q, k, v)
    assert out[0, 3].isnan().all() and out[0, torch.arange(70) != 3].isfinite().all()


def test_offsets_beyond_32_bits(generator):
    """The images of q lie 2**31 elements apart (in memory never touched)."""
    q, k, v = qkv((2, 40, 40, 8, 16), generator, torch.float16)
    far = torch.from_numpy(np.zeros(2**31 + q[0].numel(), np.float16)).as_strided(q.shape, (2**31, *q.stride()[1:]))
    far[:] = q.cpu()
    if DEVICE == "cuda":
        pytest.skip("the memory would be touched; test_more_elements_than_32_bits_count covers it")
    assert torch.equal(attention_fwd(far, k, v)[0], attention_fwd(q, k, v)[0])


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(4, 4096, 1024, 16, 64), (4, 4096, 1024, 24, 96), (2, 1024, 256, 64, 256)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_real_shapes(shape, dtype, generator):
    q, k, v = qkv(shape, generator, dtype)
    out, *_ = attention_fwd(q, k, v)
    assert_close_to_truth("out", out, attention(q.double(), k.double(), v.double()), attention(q, k, v))
