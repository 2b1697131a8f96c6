"""What a trial finds out about a conditional batch norm, and why it leaves others alone."""

import pytest
import torch
from foreign_norms import DEVIATING, NORMS, C
from normed_net import is_same, state_of
from torch import nn

import sagan_fast
from sagan_fast.interop.batch_norm_forms import parts_of
from sagan_fast.interop.batch_norm_trials import norm_form
from sagan_fast.interop.trials import Mismatch

FORMS = {  # gain, bias, bias_first, norm, 1 + gain, relu, momentum, eps
    "biggan": ("gain", "bias", False, None, True, False, 0.1, 1e-5),
    "biggan-shared": ("gain", "bias", False, None, True, False, 0.1, "eps"),
    "by attribute": ("gain", "bias", False, None, True, False, "momentum", 1e-5),
    "wrapper": ("gain", "bias", False, None, True, False, 0.1, "eps"),
    "studiogan": ("gain", "bias", False, "bn", True, False, 0.1, 1e-5),
    "studiogan-embeddings": ("embed0", "embed1", False, "bn", True, False, 0.1, 1e-5),
    "voletiv": ("embed", "embed", False, "bn", False, False, 0.1, 1e-5),
    "mmgeneration": ("weight_embedding", "bias_embedding", False, "norm", True, False, 0.1, 1e-5),
    "with relu": ("embed", "embed", True, "bn", False, True, 0.1, 1e-5),
}


@pytest.mark.parametrize("kind", NORMS)
def test_the_form_says_what_is_what(kind):
    norm = NORMS[kind]()
    before, rng = state_of(norm), torch.get_rng_state()
    form, difference = norm_form(norm, parts_of(norm))
    found = form.gain, form.bias, form.bias_first, form.norm, form.one_plus, form.relu, form.momentum, form.eps
    assert found == FORMS[kind] and 0 < difference < 1e-12
    if form.norm is None:
        assert (form.mean, form.var) == ("stored_mean", "stored_var")
    assert is_same(before, norm) and torch.equal(torch.get_rng_state(), rng)


@pytest.mark.parametrize("why", DEVIATING)
def test_what_deviates_is_left_with_its_reason(why):
    net = nn.Sequential(DEVIATING[why]())
    before, kind = state_of(net), type(net[0])
    with pytest.raises(Mismatch):
        norm_form(net[0], parts_of(net[0]))
    report = sagan_fast.accelerate(net, spectral_norm=False)
    assert why in report.left["0"] and not report.swapped and type(net[0]) is kind and is_same(before, net)
    with pytest.raises(ValueError, match="conditional batch norm or spectral norm of another form, got 0: "):
        sagan_fast.accelerate(net, strict=True)


def test_a_replaced_forward_is_left_alone():
    norm = NORMS["voletiv"]()
    norm.forward = lambda x, y: x
    with pytest.raises(Mismatch, match="its forward was replaced on the instance"):
        norm_form(norm, parts_of(norm))


def test_one_channel_and_one_class_are_enough():
    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.table = nn.BatchNorm2d(1, affine=False, momentum=None), nn.Embedding(1, 2)

        def forward(self, x, y):
            gain, bias = self.table(y)[:, :, None, None].chunk(2, 1)
            return gain * self.bn(x) + bias

    assert norm_form(Small(), parts_of(Small()))[1] < 1e-10 and C > 1
