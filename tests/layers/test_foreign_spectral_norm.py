"""Groups of other people's spectral-normed layers: each trains as it did alone, and nothing goes unsaid."""

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from foreign_layers import BigGANConv, BigGANLinear, MimicryConv, MmgenConv, Wrapped, hooked, replica_of
from normed_net import is_same, state_of
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils.spectral_norm import SpectralNorm as TorchHook
from torch.nn.utils.spectral_norm import spectral_norm as legacy

from benchmarks.accuracy import rel_rms
from sagan_fast.layers.spectral_norm import fuse_spectral_norm, spectral_norm
from shared_by_tests import randn

KINDS = {
    "biggan": lambda *sizes: BigGANConv(*sizes),
    "mmgeneration": lambda *sizes: MmgenConv(*sizes),
    "mimicry": lambda *sizes: MimicryConv(*sizes),
    "wrapper": lambda *sizes: Wrapped(nn.Conv2d(*sizes)),
    "hook": lambda *sizes: hooked(nn.Conv2d(*sizes)),
    "legacy": lambda *sizes: legacy(nn.Conv2d(*sizes), eps=1e-6),
    "parametrization": lambda *sizes: parametrizations.spectral_norm(nn.Conv2d(*sizes)),
}


class Net(nn.Sequential):
    def __init__(self, kind, first=3):
        super().__init__(KINDS[kind](first, 6, 3), nn.ReLU(), KINDS[kind](6, 4, 2), nn.AdaptiveAvgPool2d(1))

    def features(self, x):
        return self[0](x)


@pytest.fixture(params=KINDS)
def pair(request):
    """A fresh model in float64 of each kind, and an equal one."""
    theirs = Net(request.param).double()
    return theirs, copy.deepcopy(theirs)


def assert_same(ours, theirs, limit=1e-12):
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for (key, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert a.shape == b.shape and rel_rms(a, b) < limit, key


def train(models, generator, steps, after=lambda: None):
    optimizers = [torch.optim.Adam([p for p in m.parameters() if p.requires_grad], lr=1e-3) for m in models]
    for _ in range(steps):
        x = randn(2, 3, 6, 7, generator=generator)
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
        after()


@pytest.mark.parametrize("update", ["step", "forward"])
def test_a_fresh_model_trains_as_unfused_from_its_first_forward(pair, update, generator):
    theirs, ours = pair
    parameters = [id(p) for p in ours.parameters()]
    group = fuse_spectral_norm(ours, update=update)
    assert len(group) == 2
    x = randn(2, 3, 6, 7, generator=generator)
    assert rel_rms(ours(x), theirs(x)) < 1e-12
    theirs.load_state_dict(state_of(ours))
    train([ours, theirs], generator, 3, group.step if update == "step" else lambda: None)
    if update == "forward":
        assert_same(ours, theirs, 1e-10)
        assert rel_rms(ours.eval()(x), theirs.eval()(x)) < 1e-10
        assert_same(ours, theirs, 1e-10)
    assert [id(p) for p in ours.parameters()] == parameters
    before = state_of(ours)
    group.undo()
    assert is_same(before, ours) and [type(m) for m in ours.modules()] == [type(m) for m in theirs.modules()]
    for a, b in zip(ours.modules(), theirs.modules(), strict=True):
        assert set(a.__dict__) == set(b.__dict__)
    theirs.load_state_dict(before)
    assert torch.equal(ours.train()(x), theirs.train()(x))


def test_with_step_alone_one_forward_a_step_is_what_the_unfused_model_gives(pair, generator):
    theirs, ours = pair
    group = fuse_spectral_norm(ours)
    train([ours, theirs], generator, 4, group.step)
    theirs(randn(1, 3, 6, 7, generator=generator))
    assert_same(ours, theirs, 1e-10)


def test_four_fresh_layers_in_a_row_keep_the_scale(generator):
    model = nn.Sequential(*(legacy(nn.Linear(64, 64)) for _ in range(4)))
    expected = copy.deepcopy(model)(x := randn(32, 64, generator=generator, dtype=torch.float32))
    fuse_spectral_norm(model)
    torch.testing.assert_close(model(x), expected)


def test_uses_apart_from_the_models_forward_move_as_unfused(pair, generator):
    theirs, ours = pair
    fuse_spectral_norm(ours, update="forward")
    x = randn(2, 3, 6, 7, generator=generator)
    for _ in range(3):
        assert rel_rms(ours.features(x), theirs.features(x)) < 1e-12
    theirs(x), ours(x), ours[0](x), theirs[0](x)
    assert_same(ours, theirs)


@pytest.mark.parametrize("length", [0.94, 7.0])
@pytest.mark.parametrize("training", [False, True])
def test_one_vector_may_have_any_length(generator, length, training):
    model = nn.Sequential(BigGANConv(3, 6, 3), BigGANConv(6, 4, 2)).double()
    group = fuse_spectral_norm(model)
    x = randn(1, 3, 6, 7, generator=generator)
    model(x)
    model.train(training)
    expected = model(x)
    for name, buffer in model.named_buffers():
        if name.endswith("u0"):
            buffer *= length
    if training:
        u, matrix = F.normalize(model[0].u0[0], dim=0), model[0].weight.detach().flatten(1)
        assert group.sigmas()["0"] == pytest.approx(float((matrix.t() @ u).norm()), rel=1e-6)
    else:
        assert rel_rms(model(x), expected) < 1e-12


@pytest.mark.parametrize("update", ["step", "forward"])
@pytest.mark.parametrize("norm", [legacy, parametrizations.spectral_norm, spectral_norm])
def test_writes_through_data_are_seen_in_evaluation_and_by_refresh(generator, update, norm):
    model = nn.Sequential(norm(nn.Linear(9, 8)), norm(nn.ConvTranspose2d(8, 6, 3)))
    model[0](torch.zeros(1, 9))
    ema = copy.deepcopy(model) if norm is not legacy else pickle.loads(pickle.dumps(model))
    group = fuse_spectral_norm(ema, update=update)
    x = randn(1, 8, 4, 5, generator=generator, dtype=torch.float32)
    ema.eval(), model.eval()
    last = nn.Sequential(ema[1])
    ema[0](torch.ones(1, 9)), last(x)
    for a, b in zip(ema.parameters(), model.parameters(), strict=True):
        b.data.mul_(1.3).add_(0.1)
        a.data.copy_(b.data)
    with pytest.raises(RuntimeError):  # the second layer takes maps; the look for writes comes first
        ema(torch.ones(1, 9))
    torch.testing.assert_close(ema[1](x), model[1](x))
    for a, b in zip(ema.parameters(), model.parameters(), strict=True):
        a.data.copy_(b.data.mul_(0.7))
    before = state_of(ema)
    group.refresh()
    torch.testing.assert_close(ema[1](x), model[1](x))
    assert is_same(before, ema)


@pytest.mark.parametrize("update", ["step", "forward"])
def test_replicas_of_data_parallel_use_their_own_weights_and_move_as_unfused(pair, update, generator):
    theirs, ours = pair
    group = fuse_spectral_norm(ours, update=update)
    x = randn(2, 3, 6, 7, generator=generator)
    if update == "step":
        group.step()
        theirs.load_state_dict(state_of(ours))
    before = state_of(ours)
    outs = []
    for model in (theirs, ours):
        outs.append(replica_of(model, lambda p: p.detach() * 1.5 if p.ndim > 1 else p * 1)(x))
    if update == "forward":
        assert rel_rms(outs[1], outs[0]) < 1e-12
        assert_same(ours, theirs)
    elif not isinstance(ours[0], (Wrapped,)) and "HookWithU" not in str(ours[0]._forward_pre_hooks):
        assert is_same(before, ours)


def test_what_is_not_recognised_is_named():
    class Unknown(nn.Linear):
        def __init__(self):
            super().__init__(3, 3)
            self.register_buffer("u0", torch.randn(3))

    model = nn.Sequential(legacy(nn.Linear(3, 3)), Unknown(), nn.Sequential(Unknown()))
    with pytest.warns(UserWarning, match="does not know the spectral norm of 1, 2.0"):
        assert len(fuse_spectral_norm(model)) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fuse_spectral_norm(nn.Sequential(*(make(3, 3, 1) for make in KINDS.values()), nn.GRUCell(2, 2)))


def test_a_replaced_child_leaves_the_group(generator):
    model = nn.Sequential(nn.Sequential(legacy(nn.Linear(3, 3))), BigGANLinear(3, 3), spectral_norm(nn.Linear(3, 2)))
    group = fuse_spectral_norm(model)
    model[0] = nn.Identity()
    assert group.names == ["1", "2"]
    model[1] = nn.Identity()
    group.step()
    assert group.names == ["2"] == list(group.sigmas()) and model(torch.ones(1, 3)).shape == (1, 2)


def test_copies_and_files_are_free_of_the_group(pair, generator):
    theirs, ours = pair
    fuse_spectral_norm(ours, update="forward")
    x = randn(2, 3, 6, 7, generator=generator)
    copies = [copy.deepcopy(ours)]
    if not hasattr(ours[0], "parametrizations"):  # torch refuses to pickle those
        copies.append(pickle.loads(pickle.dumps(ours)))
    expected = theirs(x)
    for each in copies:
        assert isinstance(each[0], type(theirs[0])) and rel_rms(each(x), expected) < 1e-12
        assert_same(each, theirs)
    assert rel_rms(ours(x), expected) < 1e-12


def test_dim_is_an_option(generator):
    module = spectral_norm(nn.Conv2d(3, 5, 2), dim=1)
    assert module.parametrizations.weight[0]._u.shape == (3,)
    theirs = legacy(nn.ConvTranspose2d(3, 5, 2), dim=0)
    ours = spectral_norm(nn.ConvTranspose2d(3, 5, 2), dim=0)
    assert ours.parametrizations.weight[0]._u.shape == theirs.weight_u.shape == (3,)
    matrix = ours.weight.detach().flatten(1)
    assert float(torch.linalg.matrix_norm(matrix, 2)) == pytest.approx(1, abs=0.1)


def test_undo_gives_torchs_hook_back():
    model = nn.Sequential(legacy(nn.Linear(3, 3)))
    (hook,) = model[0]._forward_pre_hooks.values()
    group = fuse_spectral_norm(model)
    model(torch.ones(1, 3))
    group.undo()
    assert [*model[0]._forward_pre_hooks.values()] == [hook] and type(hook) is TorchHook
    assert len(group) == 0 and not model._forward_pre_hooks
    torch.testing.assert_close(F.normalize(model[0].weight_u, dim=0), model[0].weight_u)
