"""The block's gradients in the interpreter (on a GPU where there is one) against autograd through the reference."""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.accuracy import DTYPE_NAMES, RMS_TOLERANCE
from sagan_fast.kernels.attention.reference import attention
from sagan_fast.kernels.configs import LaunchConfig
from sagan_fast.kernels.projection.reference import project
from sagan_fast.kernels.self_attention.backward import self_attention_bwd
from sagan_fast.kernels.self_attention.forward import self_attention_fwd
from sagan_fast.kernels.self_attention.inputs import BlockInputs
from sagan_fast.kernels.self_attention.reference import unproject
from shared_by_tests import assert_close_to_truth, assert_gradient, largest_is_clear, randn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
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
    while dtype == torch.float32 and not (
        largest_is_clear(F.conv2d(x.double(), torch.cat(made[1:3]).double()[:, :, None, None]))
    ):
        x = randn(B, C, H, W, generator=generator).to(DEVICE, dtype)
    if channels_last:
        x, d_y = (t.contiguous(memory_format=torch.channels_last) for t in (x, d_y))
    return x, *made, torch.tensor(0.7, device=DEVICE), d_y


def block_gradients(x, w_theta, w_phi, w_g, w_o, b_theta, b_phi, b_g, b_o, gamma, d_y, pool, **options):
    inputs = BlockInputs(x, w_theta, w_phi, w_g, w_o, gamma, b_theta, b_phi, b_g, b_o)
    _, saved = self_attention_fwd(inputs, pool=pool)
    return self_attention_bwd(d_y, inputs, saved, **options)


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


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("gamma", [0.0, 0.01])
def test_a_gradient_of_w_o_that_fits_half_precision_is_finite(gamma, channels_last, generator):
    """The sum over positions, before it is multiplied with gamma, is 4 * 256 * 16 * 8: over float16's 65504."""
    tensors = list(
        block((4, 16, 16, 16, 2, 8, True, True, True), generator, torch.float16, channels_last=channels_last)
    )
    tensors[3] = tensors[3] * 0
    tensors[7] = torch.full_like(tensors[7], 16.0)
    tensors[-2], tensors[-1] = torch.tensor(gamma, device=DEVICE), torch.full_like(tensors[-1], 8.0)
    found = block_gradients(*tensors, pool=True)
    assert found.w_o.isfinite().all()
    assert_close_to_truth("d_w_o", found.w_o, block_truths(*tensors, pool=True)[3])


def test_what_the_kernels_have_no_strides_for_must_be_contiguous(generator):
    tensors = list(block(CASES[1], generator, torch.float32))
    tensors[7] = tensors[7].repeat_interleave(2)[::2]
    with pytest.raises(ValueError, match=r"projection_fwd: b_g must be contiguous, got strides \(2,\)"):
        block_gradients(*tensors, pool=True)


def test_gamma_at_zero_has_a_gradient_and_lets_none_through(generator):
    tensors = list(block(CASES[0], generator, torch.float32))
    tensors[-2] = torch.zeros((), device=DEVICE)
    d_x, d_w_qkv, _, d_w_o, _, d_gamma = block_gradients(*tensors, pool=True)
    assert torch.equal(d_x, tensors[-1]) and d_w_qkv.eq(0).all() and d_w_o.eq(0).all()
    truth = block_truths(*tensors, pool=True)[5]
    assert abs(d_gamma.double() - truth) < 1e-4 * tensors[-1].norm()


@pytest.mark.parametrize(
    "config", ["BLOCK_N=16 BLOCK_M=32 BLOCK_C=32 num_warps=4 num_stages=1", "BLOCK_N=128 BLOCK_M=64 BLOCK_C=32"]
)
def test_any_config_computes_the_same(config, generator):
    tensors = block(CASES[1], generator, torch.float32)
    configs = dict.fromkeys(("dkv_config", "dq_config", "preprocess_config"), LaunchConfig.parse(config))
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
