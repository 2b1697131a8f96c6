"""The module: defaults of the released code, variants, maps, hooks of other people's spectral norm, explain."""

import warnings

import pytest
import torch
from torch import nn

import sagan_fast
from sagan_fast.functional import self_attention_2d
from sagan_fast.layers.self_attention import SelfAttention2d
from shared_by_tests import randn


def test_defaults_are_those_of_the_released_code(generator):
    block = SelfAttention2d(64)
    shapes = {name: tuple(p.shape) for name, p in block.named_parameters()}
    assert shapes == {
        "gamma": (),
        "theta.weight": (8, 64, 1, 1),
        "phi.weight": (8, 64, 1, 1),
        "g.weight": (32, 64, 1, 1),
        "o.weight": (64, 32, 1, 1),
    }
    x = randn(2, 64, 6, 6, generator=generator, dtype=torch.float32)
    assert torch.equal(block(x), x)  # gamma starts at 0


def test_at_gamma_zero_only_gamma_learns(generator):
    block = SelfAttention2d(16)
    block(randn(2, 16, 6, 6, generator=generator, dtype=torch.float32)).square().sum().backward()
    assert block.gamma.grad != 0
    assert all(p.grad.eq(0).all() for name, p in block.named_parameters() if name != "gamma")


@pytest.mark.parametrize(
    "options",
    [{}, {"pool": False}, {"pool": False, "out_proj": False, "bias": True}, {"qk_channels": 3, "v_channels": 7}],
    ids=str,
)
@pytest.mark.parametrize("backend", ["eager", "sdpa", "auto"])
def test_the_module_is_the_function_of_its_parameters(options, backend, generator):
    block = SelfAttention2d(16, backend=backend, **options)
    with torch.no_grad():
        block.gamma.fill_(0.8)
        for conv in (block.theta, block.phi, block.g, block.o):
            if conv is not None and conv.bias is not None:
                conv.bias.normal_(generator=generator)
    x = randn(2, 16, 5, 8, generator=generator, dtype=torch.float32)
    o = block.o
    expected = self_attention_2d(
        x, block.theta.weight, block.phi.weight, block.g.weight, None if o is None else o.weight, block.gamma,
        b_theta=block.theta.bias, b_phi=block.phi.bias, b_g=block.g.bias, b_o=None if o is None else o.bias,
        pool=options.get("pool", True), backend="eager",
    )  # fmt: skip
    torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize("pool", [True, False])
def test_attention_map_rows_sum_to_one_and_are_what_the_block_uses(pool, generator):
    block = SelfAttention2d(16, pool=pool, out_proj=False, backend="sdpa")
    block.gamma.data.fill_(1.0)
    x = randn(2, 16, 6, 7, generator=generator, dtype=torch.float32)
    beta = block.attention_map(x)
    M = 3 * 3 if pool else 6 * 7
    assert beta.shape == (2, 42, M) and not beta.requires_grad
    torch.testing.assert_close(beta.sum(2), torch.ones(2, 42))
    v = block.g(x)
    v = (nn.functional.max_pool2d(v, 2) if pool else v).flatten(2)
    expected = x + torch.einsum("bnm,bcm->bcn", beta, v).reshape(x.shape)
    torch.testing.assert_close(block(x), expected)
    queries = [41, 0, 17]
    torch.testing.assert_close(block.attention_map(x, queries), beta[:, queries])
    torch.testing.assert_close(block.attention_map(x, torch.tensor(queries)), beta[:, queries])
    assert block.attention_map(x, []).shape == (2, 0, M)


def test_attention_map_refuses_positions_outside(generator):
    block = SelfAttention2d(16)
    with pytest.raises(ValueError, match=r"queries must be positions 0 to 15, got -1 to 3"):
        block.attention_map(torch.zeros(1, 16, 4, 4), [3, -1])


@pytest.mark.parametrize("norm", ["ours", "torch", "legacy"])
def test_spectral_norm_of_any_kind_is_seen(norm, generator):
    block = SelfAttention2d(16)
    block.gamma.data.fill_(0.8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        put = {
            "ours": sagan_fast.spectral_norm,
            "torch": nn.utils.parametrizations.spectral_norm,
            "legacy": nn.utils.spectral_norm,
        }[norm]
        for conv in (block.theta, block.phi, block.g, block.o):
            put(conv)
    x = randn(2, 16, 6, 6, generator=generator, dtype=torch.float32)
    for _ in range(20):
        block(x)  # the legacy one starts from a random u
    out = block.eval()(x)
    with torch.no_grad():
        for conv in (block.theta, block.phi, block.g, block.o):
            weight = conv.weight_orig if norm == "legacy" else conv.parametrizations.weight.original
            weight.mul_(3.0)  # W/sigma does not change with the length of W
    torch.testing.assert_close(block(x), out)


def test_the_state_of_a_biggan_style_block_loads():
    state = {f"{name}.weight": torch.randn(shape) for name, shape in (
        ("theta", (2, 16, 1, 1)), ("phi", (2, 16, 1, 1)), ("g", (8, 16, 1, 1)), ("o", (16, 8, 1, 1)))}  # fmt: skip
    SelfAttention2d(16).load_state_dict({**state, "gamma": torch.tensor(0.3)})


def test_explicit_arguments_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="v_channels must be 16 if out_proj=False, got 8"):
        SelfAttention2d(16, v_channels=8, out_proj=False)
    with pytest.raises(ValueError, match="qk_channels must be at least 1, got 0"):
        SelfAttention2d(16, qk_channels=0)
    with pytest.raises(ValueError, match="backend must be one of"):
        SelfAttention2d(16, backend="flash")
    with pytest.raises(ValueError, match=r"x must have shape \(B, 16, H, W\), got \(1, 8, 4, 4\)"):
        SelfAttention2d(16)(torch.zeros(1, 8, 4, 4))
