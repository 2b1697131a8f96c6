"""The block's forward in the interpreter (on a GPU where there is one) against the reference in float64."""

import pytest
import torch

from benchmarks.accuracy import rel_rms
from sagan_fast.kernels.attention.reference import attention
from sagan_fast.kernels.configs import LaunchConfig
from sagan_fast.kernels.self_attention.forward import block_fwd
from sagan_fast.kernels.self_attention.reference import unproject
from shared_by_tests import assert_close_to_truth, randn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CASES = [  # B, C, H, W, D_QK, D_V, pool, out_proj, bias
    (2, 64, 16, 16, 8, 32, True, True, False),
    (1, 40, 9, 13, 5, 20, True, True, True),
    (1, 24, 8, 7, 4, 24, False, False, True),
    (2, 20, 2, 2, 2, 10, True, True, True),
    (1, 96, 10, 12, 12, 48, True, True, False),
    (1, 192, 6, 10, 24, 96, True, True, True),
    (1, 96, 5, 6, 12, 96, False, False, False),
    (1, 24, 4, 6, 3, 1, True, True, False),
    (0, 16, 4, 4, 2, 8, True, True, False),
]


def block(case, generator, dtype, x_dtype=None):
    """Return x, q, k, v, the flat w_o, its bias and gamma of a block, on DEVICE."""
    B, C, H, W, D_QK, D_V, pool, out_proj, bias = case
    sizes = {"x": (B, C, H, W), "q": (B, H * W, D_QK), "w_o": (C, D_V), "b_o": (C,)}
    made = {name: randn(*size, generator=generator).to(DEVICE, dtype) for name, size in sizes.items()}
    made["x"] = made["x"].to(x_dtype or dtype)
    made["q"] = made["q"] * D_QK**-0.5
    made["w_o"] = made["w_o"] * D_V**-0.5
    M = (H // 2) * (W // 2) if pool else H * W
    made["k"] = randn(B, M, D_QK, generator=generator).to(DEVICE, dtype)
    made["v"] = randn(B, M, D_V, generator=generator).to(DEVICE, dtype)
    made["gamma"] = torch.tensor(0.7, device=DEVICE)
    if not out_proj:
        made["w_o"] = made["b_o"] = None
    if not bias:
        made["b_o"] = None
    return made


def block_reference(x, q, w_o, b_o, k, v, gamma):
    rows = attention(q, k, v)
    return unproject(rows, x, None if w_o is None else w_o[:, :, None, None], b_o, gamma), rows


def double(tensors):
    return {name: None if t is None else t.double() for name, t in tensors.items()}


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_block_matches_float64(case, dtype, channels_last, generator):
    made = block(case, generator, dtype)
    if channels_last:
        made["x"] = made["x"].contiguous(memory_format=torch.channels_last)
    y, o, *_ = block_fwd(**made)
    truth, o_truth = block_reference(**double(made))
    eager = block_reference(**made)
    assert y.stride() == made["x"].stride() and y.dtype == dtype
    assert_close_to_truth("o", o, o_truth, eager[1])
    assert_close_to_truth("y", y, truth, eager[0])


def test_float32_x_beside_half_weights_keeps_its_own_precision(generator):
    made = block(CASES[1], generator, torch.float16, torch.float32)
    made["gamma"] = made["gamma"] * 1e-6  # so that y shows how exactly x came through
    y = block_fwd(**made)[0]
    assert y.dtype == torch.float32
    assert rel_rms(y, block_reference(**double(made))[0]) < 1e-7


@pytest.mark.parametrize(
    "config",
    [
        "BLOCK_N=16 BLOCK_M=16 BLOCK_C=16 num_warps=4 num_stages=1",
        "BLOCK_N=128 BLOCK_M=32 BLOCK_C=64 maxnreg=128 sum_by_product",
    ],
)
def test_any_config_computes_the_same(config, generator):
    made = block(CASES[1], generator, torch.float32)
    y, *_ = block_fwd(**made, config=LaunchConfig.parse(config))
    assert_close_to_truth("y", y, block_reference(**double(made))[0])


def test_the_same_input_gives_the_same_bits_and_nothing_is_saved_unasked(generator):
    made = block(CASES[0], generator, torch.float32)
    first, second = block_fwd(**made), block_fwd(**made, save=False)
    assert torch.equal(first[0], second[0]) and second[1:] == (None, None, None)


@pytest.mark.gpu
def test_more_elements_than_32_bits_count():
    made = block((1, 64, 16, 16, 8, 32, False, True, False), torch.Generator().manual_seed(0), torch.bfloat16)
    B = 2**31 // made["x"].numel() + 2
    many = {name: t.expand(B, *t.shape[1:]).contiguous() if name in "xqkv" else t for name, t in made.items()}
    y = block_fwd(**many, save=False)[0]
    assert torch.equal(y[-1], y[0])
    assert_close_to_truth("y", y[-1:], block_reference(**double(made))[0])
