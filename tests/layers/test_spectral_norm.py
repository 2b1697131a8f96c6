import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from sagan_fast.layers.spectral_norm import fuse_spectral_norm, spectral_norm
from sagan_fast.testing import rel_rms


def model_with(norm):
    return nn.Sequential(
        norm(nn.Conv2d(3, 8, 3, padding=1)),
        nn.ReLU(),
        norm(nn.ConvTranspose2d(8, 5, 4)),
        nn.Flatten(),
        norm(nn.Linear(5 * 11 * 11, 4)),
    )  # noqa: E501


def test_follows_torch(generator):
    theirs = model_with(parametrizations.spectral_norm)
    ours = model_with(spectral_norm)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    opts = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (ours, theirs)]
    for _ in range(10):
        x = torch.randn(2, 3, 8, 8, generator=generator)
        for m, opt in zip((ours, theirs), opts, strict=True):
            opt.zero_grad()
            m(x).square().mean().backward()
            opt.step()
    for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        assert rel_rms(a, b) < 1e-5


@pytest.mark.parametrize("norm", [spectral_norm, parametrizations.spectral_norm])
def test_group_moves_only_in_step(generator, norm):
    model = model_with(norm)
    parameters = [id(p) for p in model.parameters()]
    before = copy.deepcopy(model.state_dict())
    group = fuse_spectral_norm(model)
    assert [id(p) for p in model.parameters()] == parameters
    assert group.names == ["0", "2", "4"] and len(group) == 3
    x = torch.randn(2, 3, 8, 8, generator=generator)
    (model(x).sum() + model(x).sum()).backward()
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    group.step()
    assert not torch.equal(
        before["0.parametrizations.weight.0._u"], model.state_dict()["0.parametrizations.weight.0._u"]
    )
    for name, sigma in group.sigmas().items():
        weight = model.get_submodule(name).parametrizations.weight
        assert torch.allclose(weight.original / sigma, model.get_submodule(name).weight)
