"""The module: defaults of the released code, variants, maps, hooks of other people's spectral norm, explain."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from foreign_layers import BigGANConv, MimicryConv, Wrapped, hooked
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


def by_calling(block, x, pool=True):
    """The block's formula, its convolutions called."""
    q, k, v = block.theta(x), block.phi(x), block.g(x)
    if pool:
        k, v = F.max_pool2d(k, 2), F.max_pool2d(v, 2)
    beta = (q.flatten(2).mT @ k.flatten(2)).softmax(-1)
    out = (v.flatten(2) @ beta.mT).unflatten(2, x.shape[2:])
    return x + block.gamma * (out if block.o is None else block.o(out))


CONVOLUTIONS = {
    "biggan": lambda old: BigGANConv(old.in_channels, old.out_channels, 1, bias=False),
    "mimicry": lambda old: MimicryConv(old.in_channels, old.out_channels, 1),
    "wrapper": Wrapped,
    "hook": hooked,
    "unknown forward": lambda old: Doubling(old.in_channels, old.out_channels, 1),
    "any module": lambda old: nn.Sequential(old, nn.Tanh()),
}


class Doubling(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("kind", CONVOLUTIONS)
@pytest.mark.parametrize("training", [True, False])
def test_a_convolution_with_its_own_norm_or_forward_is_never_read_raw(kind, training, generator):
    block = SelfAttention2d(16).double()
    block.gamma.data.fill_(0.8)
    for name in ("theta", "phi", "g", "o"):
        setattr(block, name, CONVOLUTIONS[kind](getattr(block, name)).double())
    twin = copy.deepcopy(block)
    block.train(training), twin.train(training)
    x = randn(2, 16, 6, 7, generator=generator)
    torch.testing.assert_close(block(x), by_calling(twin, x))
    assert ("called" in block.last_choice.reason) == (kind in ("unknown forward", "any module"))
    for key, value in twin.state_dict().items():
        torch.testing.assert_close(block.state_dict()[key], value)
    if not training:
        assert block.attention_map(x).sum(2).allclose(torch.ones(2, 42, dtype=torch.float64))


def test_hooks_of_the_convolutions_run_and_what_they_change_counts(generator):
    block = SelfAttention2d(16).double()
    block.gamma.data.fill_(0.8)
    x, seen = randn(2, 16, 6, 7, generator=generator), []
    block.theta.register_forward_hook(lambda module, inputs, out: seen.append(out.shape))
    block.phi.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))
    block.g.register_forward_pre_hook(lambda module, inputs, options: None, with_kwargs=True)
    block.o.register_full_backward_hook(lambda module, grad_in, grad_out: seen.append("backward"))
    out = block(x.requires_grad_())
    out.sum().backward()
    assert seen == [(2, 2, 6, 7), "backward"]
    torch.testing.assert_close(out, by_calling(block, x))


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("kind", ["biggan", "mimicry", "legacy"])
def test_the_state_of_a_spectral_normed_block_of_others_loads(kind, normed, generator):
    make = {**CONVOLUTIONS, "legacy": lambda old: nn.utils.spectral_norm(old)}[kind]
    theirs, ours = SelfAttention2d(16, bias=kind == "mimicry"), SelfAttention2d(16, bias=kind == "mimicry")
    theirs.gamma = nn.Parameter(torch.full((1,), 0.8))
    for name in ("theta", "phi", "g", "o"):
        setattr(theirs, name, make(getattr(theirs, name)))
        if normed:
            sagan_fast.spectral_norm(getattr(ours, name))
    x = randn(2, 16, 6, 7, generator=generator, dtype=torch.float32)
    theirs(x)
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))
    assert ours.gamma.shape == (1,) == ours.state_dict()["gamma"].shape
    ours.load_state_dict({**ours.state_dict(), "gamma": torch.tensor(0.3)})
    assert ours.gamma.shape == () and ours.gamma.item() == pytest.approx(0.3)


def test_explicit_arguments_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="v_channels must be 16 if out_proj=False, got 8"):
        SelfAttention2d(16, v_channels=8, out_proj=False)
    with pytest.raises(ValueError, match="qk_channels must be at least 1, got 0"):
        SelfAttention2d(16, qk_channels=0)
    with pytest.raises(ValueError, match="backend must be one of"):
        SelfAttention2d(16, backend="flash")
    with pytest.raises(ValueError, match=r"x must have shape \(B, 16, H, W\), got \(1, 8, 4, 4\)"):
        SelfAttention2d(16)(torch.zeros(1, 8, 4, 4))
