"""Keys and values with the pool inside against the reference in float64, max_pool2d's rules among it."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sagan_fast.kernels.configs import LaunchConfig
from sagan_fast.kernels.projection.forward import projection_fwd
from sagan_fast.kernels.projection.reference import project
from shared_by_tests import assert_close_to_truth, largest_is_clear, randn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CASES = [  # B, C, H, W, D_QK, D_V
    (2, 64, 16, 16, 8, 32),
    (1, 40, 9, 13, 5, 20),
    (1, 3, 2, 3, 1, 1),
    (1, 70, 6, 22, 12, 48),
    (1, 33, 5, 7, 24, 96),
    (0, 16, 4, 4, 2, 8),
]


def inputs(case, generator, dtype, bias=True):
    B, C, H, W, D_QK, D_V = case
    sizes = ((B, C, H, W), (D_QK, C), (D_QK, C), (D_V, C), (D_QK,), (D_QK,), (D_V,))
    x, *made = (randn(*size, generator=generator).to(DEVICE, dtype) for size in sizes)
    return x, *(w * C**-0.5 for w in made[:3]), *(made[3:] if bias else (None,) * 3)


def reference(x, w_theta, w_phi, w_g, b_theta, b_phi, b_g, pool):
    return (
        project(x, w_theta[:, :, None, None], b_theta),
        project(x, w_phi[:, :, None, None], b_phi, pool),
        project(x, w_g[:, :, None, None], b_g, pool),
    )


def in_double(tensors):
    return [None if t is None else t.double() for t in tensors]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("pool", [True, False], ids=["pooled", "unpooled"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_queries_keys_and_values_match_float64(case, dtype, pool, channels_last, generator):
    x, *rest = inputs(case, generator, dtype)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    *found, argmax = projection_fwd(x, *rest, pool=pool)
    truths, eagers = reference(*in_double([x, *rest]), pool), reference(x, *rest, pool)
    assert (argmax is not None) == pool
    squares = reference(*(None if t is None else t.square() for t in in_double([x, *rest])), pool)
    for name, rows, truth, eager, square in zip("qkv", found, truths, eagers, squares, strict=True):
        assert_close_to_truth(name, rows, truth, eager, terms=square.sqrt())


@pytest.mark.parametrize("chunk", [16, 128], ids=["in chunks", "whole"])
@pytest.mark.parametrize("pool", [True, False], ids=["pooled", "unpooled"])
def test_chunks_and_all_channels_at_once(chunk, pool, generator):
    x, *rest = inputs((2, 100, 7, 9, 12, 48), generator, torch.float32)
    x = x.contiguous(memory_format=torch.channels_last)
    *found, _ = projection_fwd(x, *rest, pool=pool, config=LaunchConfig(BLOCK_M=32, BLOCK_C=chunk, num_warps=4))
    for name, rows, truth in zip("qkv", found, reference(*in_double([x, *rest]), pool), strict=True):
        assert_close_to_truth(name, rows, truth)


@settings(max_examples=10, deadline=None)
@given(
    case=st.tuples(*(st.integers(low, high) for low, high in ((1, 2), (1, 40), (2, 11), (2, 11), (1, 20), (1, 40)))),
    seed=st.integers(0, 2**31),
    bias=st.booleans(),
)
def test_argmax_is_max_pool2ds(case, seed, bias):
    x, *rest = inputs(case, torch.Generator().manual_seed(seed), torch.float32, bias)
    *_, argmax = projection_fwd(x, *rest, pool=True)
    W = case[3]
    wide = torch.cat([project(x.double(), w[:, :, None, None].double()) for w in rest[1:3]], 2)
    maps = wide.transpose(1, 2).unflatten(2, case[2:4])
    assume(largest_is_clear(maps))
    _, flat = torch.nn.functional.max_pool2d(maps, 2, return_indices=True)  # flat positions row * W + column
    truth = (flat // W % 2 * 2 + flat % W % 2).flatten(2).transpose(1, 2)
    assert torch.equal(argmax.long(), truth)


def test_of_equal_values_the_first_wins_and_nan_over_all():
    x = torch.zeros(1, 1, 2, 8)
    x[0, 0, :, 0:2] = 3.0  # four equal
    x[0, 0, :, 2:4] = torch.tensor([[1.0, 2.0], [2.0, 0.0]])  # two equal
    x[0, 0, :, 4:6] = torch.tensor([[9.0, 1.0], [torch.nan, 2.0]])
    x[0, 0, :, 6:8] = -torch.inf
    one = torch.ones(1, 1, device=DEVICE)
    _, k, v, argmax = projection_fwd(x.to(DEVICE), one, one, one, pool=True)
    expected = torch.tensor([3.0, 2.0, torch.nan, -torch.inf])
    torch.testing.assert_close(k[0, :, 0].cpu(), expected, equal_nan=True)
    torch.testing.assert_close(v[0, :, 0].cpu(), expected, equal_nan=True)
    assert argmax[0].tolist() == [[0, 0], [1, 1], [2, 2], [0, 0]]


def test_float32_x_beside_half_weights(generator):
    x, *rest = inputs(CASES[1], generator, torch.float16)
    wide = projection_fwd(x.float(), *rest, pool=True)
    narrow = projection_fwd(x, *rest, pool=True)
    assert all(torch.equal(a, b) for a, b in zip(wide, narrow, strict=True)) and wide[0].dtype == torch.float16


@pytest.mark.parametrize(
    "config",
    [LaunchConfig(BLOCK_M=16, BLOCK_C=16, num_warps=4, num_stages=1), LaunchConfig(BLOCK_M=128, BLOCK_C=64)],
    ids=str,
)
def test_any_config_computes_the_same(config, generator):
    x, *rest = inputs(CASES[1], generator, torch.float32)
    *found, argmax = projection_fwd(x, *rest, pool=True, save=False, config=config)
    assert argmax is None
    for name, rows, truth in zip("qkv", found, reference(*in_double([x, *rest]), True), strict=True):
        assert_close_to_truth(name, rows, truth)
