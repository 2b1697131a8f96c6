"""The backward kernels in the interpreter (on a GPU where there is one) against autograd through the reference."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from sagan_fast.kernels.attention.backward import attention_bwd, block_bwd
from sagan_fast.kernels.attention.configs import AttentionConfig, DeltaConfig
from sagan_fast.kernels.attention.forward import attention_fwd, block_fwd
from sagan_fast.kernels.attention.reference import attention
from sagan_fast.kernels.projection.forward import projection_fwd
from sagan_fast.kernels.projection.reference import project, unproject
from sagan_fast.testing import DTYPE_NAMES, RMS_TOLERANCE, assert_close_to_truth, randn, rel_rms

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
CASES = [  # B, C, H, W, D_QK, D_V, pool, out_proj, bias
    (2, 64, 16, 16, 8, 32, True, True, False),
    (1, 40, 9, 13, 5, 20, True, True, True),
    (1, 24, 8, 7, 4, 24, False, False, True),
    (1, 96, 10, 12, 12, 48, True, True, False),
    (1, 192, 6, 10, 24, 96, True, True, True),
    (1, 96, 5, 6, 12, 96, False, False, False),
    (1, 24, 4, 6, 3, 1, True, True, False),
]
NAMES = ("d_x", "d_w_qkv", "d_b_qkv", "d_w_o", "d_b_o")


def qkv(shape, generator, dtype):
    """q, k, v and the output's gradient; logits of a standard deviation of 1."""
    B, N, M, D_QK, D_V = shape
    sizes = ((B, N, D_QK), (B, M, D_QK), (B, M, D_V), (B, N, D_V))
    spreads = (D_QK**-0.25, D_QK**-0.25, 1.0, 1.0)
    return [randn(*s, generator=generator, scale=c).to(DEVICE, dtype) for s, c in zip(sizes, spreads, strict=True)]


def exact_gradients(q, k, v, d_out, scale=1.0, dtype=torch.float64):
    leaves = [t.detach().to(dtype).requires_grad_() for t in (q, k, v)]
    return torch.autograd.grad(attention(*leaves, scale), leaves, d_out.to(dtype))


def assert_gradient(name, found, truth, eager=None, dtype=None, terms=None):
    """Within the table, of `truth` or of its `terms`, or twice eager's error: sums may be small beside their terms."""
    if eager is None:
        assert_close_to_truth(name, found, truth)
        return
    limit = RMS_TOLERANCE[DTYPE_NAMES[dtype or found.dtype]]
    error = (found.double() - truth).norm()
    assert error <= 2 * (eager.double() - truth).norm() + limit * (truth if terms is None else terms).norm(), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_gradients_match_float64(shape, dtype, generator):
    q, k, v, d_out = qkv(shape, generator, dtype)
    out, lse = attention_fwd(q, k, v)
    truths, eagers = exact_gradients(q, k, v, d_out), exact_gradients(q, k, v, d_out, dtype=dtype)
    found = attention_bwd(d_out, q, k, v, out, lse)
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
    for name, grad, truth in zip(("dq", "dk", "dv"), found, truths, strict=True):
        assert_close_to_truth(name, grad, truth)


@pytest.mark.parametrize("M", [64, 50])
def test_log_sum_exps_near_minus_120_give_finite_gradients(M, generator):
    """Where a ragged tile's exp2(0 - lse) overflows, and where cuDNN returned NaN (pytorch#196678)."""
    q, k, v, d_out = qkv((2, 70, M, 15, 8), generator, torch.float32)
    q = torch.cat([q, torch.full_like(q[..., :1], -15)], 2)
    k = torch.cat([k, torch.full_like(k[..., :1], 8)], 2)
    out, lse = attention_fwd(q, k, v)
    found = attention_bwd(d_out, q, k, v, out, lse)
    for grad, truth in zip(found, exact_gradients(q, k, v, d_out), strict=True):
        assert rel_rms(grad, truth) <= 2 * 120 * 2**-24  # float32 rounds such a logit, so all it weights, by half of it


def block(case, generator, dtype, x_dtype=None, channels_last=False):
    """Return the tensors of a block: x, flat weights theta, phi, g, o, biases in that order, gamma, and d_y."""
    B, C, H, W, D_QK, D_V, pool, out_proj, bias = case
    sizes = [(D_QK, C), (D_QK, C), (D_V, C), (C, D_V), (D_QK,), (D_QK,), (D_V,), (C,)]
    spreads = [C**-0.5 * D_QK**-0.25] * 2 + [C**-0.5, D_V**-0.5] + [0.5] * 4
    made = [randn(*s, generator=generator, scale=c).to(DEVICE, dtype) for s, c in zip(sizes, spreads, strict=True)]
    if not out_proj:
        made[3] = made[7] = None
    if not bias:
        made[4:] = [None] * 4
    x, d_y = (randn(B, C, H, W, generator=generator).to(DEVICE, x_dtype or dtype) for _ in range(2))
    if channels_last:
        x, d_y = (t.contiguous(memory_format=torch.channels_last) for t in (x, d_y))
    return x, *made, torch.tensor(0.7, device=DEVICE), d_y


def block_gradients(x, w_theta, w_phi, w_g, w_o, b_theta, b_phi, b_g, b_o, gamma, d_y, pool, **options):
    q, k, v, argmax = projection_fwd(x, w_theta, w_phi, w_g, b_theta, b_phi, b_g, pool=pool)
    _, o, lse = block_fwd(x, q, k, v, w_o, gamma, b_o)
    w_qkv = torch.cat([w_theta, w_phi, w_g])
    return block_bwd(d_y, x, w_qkv, w_o, b_o, gamma, q, k, v, o, lse, argmax, **options)


def rows_of(maps, pool):
    eye = torch.eye(maps.shape[1], device=maps.device, dtype=maps.dtype)
    return project(maps, eye[:, :, None, None], None, pool)


def block_truths(x, *rest, pool, dtype=torch.float64):
    """The same by autograd, in `dtype`, and what d_b_qkv adds up, without signs; absent gradients are None."""
    *tensors, d_y = rest
    leaves = [None if t is None else t.detach().to(dtype).requires_grad_() for t in (x, *tensors)]
    x, w_theta, w_phi, w_g, w_o, b_theta, b_phi, b_g, b_o, gamma = leaves
    maps = [F.conv2d(x, w[:, :, None, None], b) for w, b in ((w_theta, b_theta), (w_phi, b_phi), (w_g, b_g))]
    for projected in maps:
        projected.retain_grad()
    q, k, v = (rows_of(projected, p) for projected, p in zip(maps, (False, pool, pool), strict=True))
    unproject(attention(q, k, v), x, None if w_o is None else w_o[:, :, None, None], b_o, gamma).backward(d_y.to(dtype))
    together = [
        torch.cat([t.grad for t in three]) if three[0] is not None else None for three in (leaves[1:4], leaves[5:8])
    ]
    terms = torch.cat([projected.grad.double().abs().sum((0, 2, 3)) for projected in maps])
    return x.grad, *together, None if w_o is None else w_o.grad, None if b_o is None else b_o.grad, gamma.grad, terms


def assert_block(found, truths, eagers, d_y):
    for name, grad, truth, eager in zip(NAMES, found, truths, eagers, strict=False):
        if truth is not None:
            rounded = name == "d_b_qkv" and found[1].dtype != torch.float32  # as o is, which every position's share has
            terms = truths[6] if rounded else None
            assert_gradient(name, grad, truth, eager, found[1].dtype, terms)  # the dtype of the products
    floor = RMS_TOLERANCE[DTYPE_NAMES[found[1].dtype]] * d_y.double().norm() * 3  # one number, left over of many
    assert abs(found[5].double() - truths[5]) <= 2 * abs(eagers[5].double() - truths[5]) + floor


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_block_gradients_match_float64(case, dtype, channels_last, generator):
    tensors = block(case, generator, dtype, channels_last=channels_last)
    found = block_gradients(*tensors, pool=case[6])
    assert found[0].stride() == tensors[0].stride()
    eagers = block_truths(*tensors, pool=case[6], dtype=dtype)
    assert_block(found, block_truths(*tensors, pool=case[6]), eagers, tensors[-1])


def test_float32_x_beside_half_weights(generator):
    tensors = block(CASES[1], generator, torch.float16, torch.float32)
    found = block_gradients(*tensors, pool=True)
    assert found[0].dtype == torch.float32 and found[1].dtype == torch.float16
    rounded = tensors[0].half(), *tensors[1:]  # as in the products: of nearly equal values another may be the largest
    eagers = block_truths(*rounded, pool=True, dtype=torch.float16)
    assert_block(found, block_truths(*rounded, pool=True), eagers, tensors[-1])


def test_only_what_is_needed_is_made(generator):
    tensors = block(CASES[1], generator, torch.float32)
    some = block_gradients(*tensors, pool=True, need_input=False, need_weights=False, need_biases=False)
    assert some[:5] == (None,) * 5 and some[5].shape == ()


def test_gamma_at_zero_has_a_gradient_and_lets_none_through(generator):
    tensors = list(block(CASES[0], generator, torch.float32))
    tensors[-2] = torch.zeros((), device=DEVICE)
    d_x, d_w_qkv, _, d_w_o, _, d_gamma = block_gradients(*tensors, pool=True)
    assert torch.equal(d_x, tensors[-1]) and d_w_qkv.eq(0).all() and d_w_o.eq(0).all()
    truth = block_truths(*tensors, pool=True)[5]
    assert abs(d_gamma.double() - truth) < 1e-4 * tensors[-1].norm()


@pytest.mark.parametrize("config", [AttentionConfig(16, 32, 16, 4, 1), AttentionConfig(128, 64, 64, 8, 2)], ids=str)
def test_any_config_computes_the_same(config, generator):
    tensors = block(CASES[1], generator, torch.float32)
    configs = {"dkv_config": config, "dq_config": config, "delta_config": DeltaConfig(config.BLOCK_N, 32, 4, 1)}
    found, truths = block_gradients(*tensors, pool=True, **configs), block_truths(*tensors, pool=True)
    for name, grad, truth in zip(NAMES, found, truths, strict=False):
        assert_close_to_truth(name, grad, truth)


def test_the_same_input_gives_the_same_bits(generator):
    tensors = block(CASES[1], generator, torch.float16)
    first, second = (block_gradients(*tensors, pool=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case",
    [(2, 128, 64, 64, 16, 64, True, True, False), (2, 96, 64, 64, 12, 48, True, True, False),
     (2, 512, 32, 32, 64, 256, True, True, False), (2, 64, 32, 32, 8, 64, False, False, True)],
    ids=str,
)  # fmt: skip
def test_real_shapes(case, dtype, channels_last, generator):
    tensors = block(case, generator, dtype, channels_last=channels_last)
    found = block_gradients(*tensors, pool=case[6])
    eagers = block_truths(*tensors, pool=case[6], dtype=dtype)
    assert_block(found, block_truths(*tensors, pool=case[6]), eagers, tensors[-1])
