import copy
import io

import pytest
import torch
import torch.nn.functional as F
from foreign_layers import BigGANConv
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.spectral_norm import SpectralNorm as LegacyHook
from torch.nn.utils.spectral_norm import spectral_norm as legacy_spectral_norm

from benchmarks.accuracy import rel_rms
from sagan_fast.layers.spectral_norm import SpectralNorm, fuse_spectral_norm, spectral_norm
from shared_by_tests import assert_close_to_truth

EVERY = [spectral_norm, parametrizations.spectral_norm, legacy_spectral_norm]


class Net(nn.Sequential):
    def __init__(self, norm):
        super().__init__(
            norm(nn.Conv2d(3, 8, 3, padding=1)),
            nn.ReLU(),
            norm(nn.ConvTranspose2d(8, 5, 4, stride=2)),
            nn.Flatten(),
            norm(nn.Linear(5 * 18 * 18, 4)),
        )


def images(generator, count=2, dtype=torch.float32):
    return torch.randn(count, 3, 8, 8, generator=generator, dtype=dtype)


def train(models, optimizers, generator, steps, after=lambda: None):
    """Adam divides a gradient by its own size: in float32 rounding alone would part the two within few steps."""
    for _ in range(steps):
        x, y = images(generator, dtype=torch.float64), torch.randn(2, 4, generator=generator, dtype=torch.float64)
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            (model(x) - y).square().sum().backward()
            optimizer.step()
        after()


def adams(*models):
    return [torch.optim.Adam(model.parameters(), lr=1e-3, betas=(0.0, 0.9)) for model in models]


def assert_same_state(a, b, limit=1e-10):
    for (key, ours), theirs in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert rel_rms(ours, theirs) < limit, key


def test_state_dict_keys_and_start_are_those_of_torch():
    torch.manual_seed(0)
    theirs = Net(parametrizations.spectral_norm)
    torch.manual_seed(0)
    ours = Net(spectral_norm)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert_same_state(ours, theirs, 1e-5)
    assert ours[2].parametrizations.weight[0]._u.shape == (5,)


def test_follows_torch_for_50_training_steps_and_through_checkpoints_both_ways(generator):
    theirs, ours = Net(parametrizations.spectral_norm).double(), Net(spectral_norm).double()
    ours.load_state_dict(theirs.state_dict())
    train([ours, theirs], adams(ours, theirs), generator, 50)
    assert_same_state(ours, theirs)
    stream = io.BytesIO()
    torch.save(ours.state_dict(), stream)
    stream.seek(0)
    fresh = Net(parametrizations.spectral_norm).double()
    fresh.load_state_dict(torch.load(stream, weights_only=True))
    ours.eval(), fresh.eval()
    x = images(generator, dtype=torch.float64)
    torch.testing.assert_close(fresh(x), ours(x))


@pytest.mark.parametrize("norm", EVERY)
def test_fused_per_forward_follows_torch_for_50_training_steps(generator, norm):
    if norm is spectral_norm:
        theirs, ours = Net(parametrizations.spectral_norm).double(), Net(spectral_norm).double()
        ours.load_state_dict(theirs.state_dict())
    else:
        theirs = Net(norm).double()
        ours = copy.deepcopy(theirs)
    group = fuse_spectral_norm(ours, update="forward")
    assert len(group) == 3
    train([ours, theirs], adams(ours, theirs), generator, 50)
    assert_same_state(ours, theirs)


@pytest.mark.parametrize("norm", EVERY)
def test_fused_per_step_follows_torch_moved_once_per_step(generator, norm):
    """torch moves u and v before the forward, the group after the optimizer: with one forward a step, the same."""
    theirs = Net(norm).double()
    ours = copy.deepcopy(theirs)
    group = fuse_spectral_norm(ours)
    group.step()
    train([ours, theirs], adams(ours, theirs), generator, 30, group.step)
    theirs(images(generator, dtype=torch.float64))
    assert_same_state(ours, theirs)


def test_biggan_layers_follow_their_own(generator):
    theirs = nn.Sequential(BigGANConv(3, 6, 3), nn.ReLU(), BigGANConv(6, 4, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    theirs.double()
    ours = copy.deepcopy(theirs)
    keys = list(ours.state_dict())
    group = fuse_spectral_norm(ours)
    group.step()
    assert list(ours.state_dict()) == keys and group.names == ["0", "2"]
    train([ours, theirs], adams(ours, theirs), generator, 20, group.step)
    theirs(images(generator, dtype=torch.float64))
    assert_same_state(ours, theirs)
    assert group.sigmas()["0"] == pytest.approx(theirs[0].sv0.item(), rel=1e-6)
    # A checkpoint brings another u; v is not in it and must follow.
    other = copy.deepcopy(theirs.state_dict())
    other["0.u0"] = torch.randn(1, 6, generator=generator, dtype=torch.float64)
    ours.load_state_dict(other)
    u, matrix = F.normalize(other["0.u0"][0], dim=0), other["0.weight"].flatten(1)
    expected = torch.dot(u, matrix @ F.normalize(matrix.t() @ u, dim=0)).item()
    assert group.sigmas()["0"] == pytest.approx(expected, rel=1e-6)
    clone = copy.deepcopy(ours).eval()
    assert clone[0].W_().shape == (6, 3, 3, 3)


def test_several_singular_values_are_left_alone():
    model = nn.Sequential(BigGANConv(3, 6, 3, num_svs=2), BigGANConv(6, 4, 3))
    with pytest.warns(UserWarning, match="keeps 2 singular values"):
        assert fuse_spectral_norm(model).names == ["1"]


@pytest.mark.parametrize("norm", EVERY)
@pytest.mark.parametrize("update", ["step", "forward"])
def test_taking_over_keeps_parameters_vectors_and_keys(norm, update):
    model = Net(norm)
    parameters, state = [id(p) for p in model.parameters()], copy.deepcopy(model.state_dict())
    group = fuse_spectral_norm(model, update=update)
    model.eval()
    model(torch.ones(1, 3, 8, 8))
    assert [id(p) for p in model.parameters()] == parameters
    assert group.names == ["0", "2", "4"] and len(group) == 3
    assert list(state) == list(model.state_dict())
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


def test_evaluation_before_the_first_training_step_moves_nothing(generator):
    theirs, ours = Net(parametrizations.spectral_norm).eval(), Net(spectral_norm).eval()
    ours.load_state_dict(theirs.state_dict())
    x = images(generator)
    before = copy.deepcopy(ours.state_dict())
    torch.testing.assert_close(ours(x), theirs(x))
    assert all(torch.equal(before[key], value) for key, value in ours.state_dict().items())


def test_alone_two_forwards_then_one_backward_as_torch(generator):
    theirs, ours = Net(parametrizations.spectral_norm), Net(spectral_norm)
    ours.load_state_dict(theirs.state_dict())
    real, fake = images(generator), images(generator)
    for model in (ours, theirs):
        (model(real).sum() - model(fake).square().sum()).backward()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_close_to_truth("gradient", a.grad, b.grad.double(), precision="tf32")


@pytest.mark.parametrize("fused", [None, "step", "forward"])
@pytest.mark.parametrize("norm", [*EVERY, BigGANConv])
def test_a_weight_of_zeros_recovers(generator, norm, fused):
    """With torch's own, u and v of a zero weight are zeros from then on, and the layer gives NaN for ever."""
    layer = BigGANConv(3, 8, 3) if norm is BigGANConv else norm(nn.Conv2d(3, 8, 3))
    if norm is not spectral_norm and fused is None:
        pytest.skip("not our module")
    model = nn.Sequential(layer).double()
    group = fuse_spectral_norm(model, update=fused) if fused else None
    x = images(generator, dtype=torch.float64)
    model(x)
    weight = next(p for name, p in model.named_parameters() if p.ndim == 4)
    U, S, V = torch.linalg.svd(weight.detach().flatten(1), full_matrices=False)
    good = (U * 0.5 ** torch.arange(len(S)) @ V).view_as(weight)  # singular values so far apart that the iteration ends

    def after(value):
        with torch.no_grad():
            weight.copy_(value)
        if fused == "step":
            group.step()
        return model(x)

    assert after(torch.zeros_like(good)).isnan().all()
    for _ in range(100):
        out = after(good)
    sigma = torch.linalg.matrix_norm(good.flatten(1), 2)
    bias = next(p for p in model.parameters() if p.ndim == 1)
    torch.testing.assert_close(out, F.conv2d(x, good / sigma, bias))


def test_a_layer_that_begins_with_zeros_learns(generator):
    layer = nn.Linear(6, 4)
    nn.init.zeros_(layer.weight)
    spectral_norm(layer)
    assert layer(torch.zeros(1, 6)).isnan().all()
    with torch.no_grad():
        layer.parametrizations.weight.original.copy_(torch.randn(4, 6, generator=generator))
    for _ in range(100):
        weight = layer.weight
    assert torch.linalg.matrix_norm(weight, 2).item() == pytest.approx(1.0, abs=1e-4)


def test_half_precision_weights_and_models(generator):
    layer = spectral_norm(nn.Linear(6, 4).half())
    norm = layer.parametrizations.weight[0]
    assert layer.weight.dtype == torch.float16 and norm._u.dtype == torch.float32
    layer = spectral_norm(nn.Linear(6, 4)).half()
    assert layer.weight.dtype == torch.float16 and norm._u.isfinite().all()


@pytest.mark.parametrize("norm", [spectral_norm, parametrizations.spectral_norm])
@pytest.mark.parametrize("fused", [False, True])
def test_removed_parametrization_leaves_normalised_weight(generator, norm, fused):
    model = Net(norm).eval()
    x = images(generator)
    if fused:
        group = fuse_spectral_norm(model)
    kept = model[0].weight.detach().clone()
    parametrize.remove_parametrizations(model[0], "weight")
    assert isinstance(model[0].weight, nn.Parameter)
    if fused:
        assert group.names == ["2", "4"]
        group.step()  # must not write where the weight is now
        group.sigmas()
    expected = model(x).detach()
    parametrize.remove_parametrizations(model[2], "weight")
    parametrize.remove_parametrizations(model[4], "weight")
    torch.testing.assert_close(model(x), expected)
    assert torch.equal(model[0].weight, kept)


def test_removed_legacy_hook_leaves_normalised_weight(generator):
    model = Net(legacy_spectral_norm)
    group = fuse_spectral_norm(model)
    group.step()
    weight = model[0].weight_orig.detach() / group.sigmas()["0"]
    nn.utils.remove_spectral_norm(model[0])
    assert group.names == ["2", "4"]
    model[4].weight_orig.data.mul_(2)
    group.step()
    torch.testing.assert_close(model[0].weight.detach(), weight)
    assert not any(isinstance(hook, LegacyHook) for hook in model[0]._forward_pre_hooks.values())


def test_one_axis_is_divided_by_its_length():
    module = spectral_norm(nn.LayerNorm(5))
    torch.testing.assert_close(module.weight, torch.full((5,), 5**-0.5))
    with pytest.warns(UserWarning, match="no spectral-normed weight"):
        assert len(fuse_spectral_norm(module)) == 0


def test_refuses():
    with pytest.raises(ValueError, match="name must be a parameter of Linear"):
        spectral_norm(nn.Linear(2, 2), "wait")
    with pytest.raises(ValueError, match="n_power_iterations must be at least 1"):
        spectral_norm(nn.Linear(2, 2), n_power_iterations=0)
    with pytest.raises(ValueError, match="update must be 'step' or 'forward'"):
        fuse_spectral_norm(spectral_norm(nn.Linear(2, 2)), update="epoch")


def test_second_parametrization_is_left_alone():
    module = nn.Linear(3, 3)
    parametrize.register_parametrization(module, "weight", nn.Tanh())
    spectral_norm(module)
    with pytest.warns(UserWarning, match="another parametrization comes first"):
        group = fuse_spectral_norm(nn.Sequential(module, spectral_norm(nn.Linear(2, 2))))
    assert group.names == ["1"]
    assert isinstance(module.parametrizations.weight[1], SpectralNorm)
