import copy
import math

import pytest
import torch
from foreign_attention import THETA, Block, WithClasses, conv
from foreign_layers import BigGANConv
from normed_net import is_same, state_of
from torch import nn
from torch.nn.utils.spectral_norm import spectral_norm as legacy

from sagan_fast.interop.trials import (
    Mismatch,
    attention_form,
    float64_copy,
    relative,
    spectral_norm_difference,
    worst_of,
)


def test_the_copy_is_in_float64_without_hooks_and_the_original_untouched():
    layer = legacy(nn.Conv2d(3, 4, 1))
    layer.register_forward_hook(lambda *_: pytest.fail("a hook of the user ran"))
    layer.register_forward_pre_hook(lambda *_: pytest.fail("a hook of the user ran"))
    layer.weight = layer.weight_orig * 2  # with history, as after a forward in training
    before = state_of(layer)
    double = float64_copy(layer)
    assert double(torch.zeros(1, 3, 2, 2, dtype=torch.float64)).dtype == torch.float64
    assert is_same(before, layer) and len(layer._forward_hooks) == 1 and len(layer._forward_pre_hooks) == 2


def test_the_form_says_names_pool_and_what_the_forward_reads():
    paths = [(name,) for name in THETA]
    form, difference = attention_form(WithClasses(conv, THETA), paths, ["gamma"])
    assert form[:6] == (("theta",), ("phi",), ("g",), ("o",), "gamma", True) and difference < 1e-12
    assert form.returns is None and not form.reads_more

    class Switch(Block):
        def forward(self, x, off=False):
            return x if off else super().forward(x)

    assert attention_form(Switch(conv, THETA), paths, ["gamma"])[0].reads_more

    class Other(Block):
        def output(self, out, x):
            return super().output(out.sin(), x)

    with pytest.raises(Mismatch, match=r"not that of the block: the nearest form is .* off"):
        attention_form(Other(conv, THETA), paths, ["gamma"])


def test_relative_differences_and_shapes():
    assert worst_of(0.0, 2.0, 1.0) == 2.0 and math.isnan(worst_of(1.0, math.nan, 2.0))
    assert relative(torch.tensor([1.0, 2.5]), torch.tensor([1.0, 2.0])) == 0.25
    assert relative(torch.zeros(2), torch.zeros(3)) == float("inf")


def test_a_spectral_norm_that_is_another_is_a_mismatch():
    class Detached(BigGANConv):
        def W_(self):  # noqa: N802
            return self.weight / (super().W_()[0, 0, 0, 0] / self.weight[0, 0, 0, 0]).detach() ** -1

    assert spectral_norm_difference(BigGANConv(3, 4, 2, iterations=3)) < 1e-12
    layer = Detached(3, 4, 2)
    state = copy.deepcopy(layer.state_dict())
    with pytest.raises(Mismatch, match="spectral norm differs by"):
        spectral_norm_difference(layer)
    assert is_same(state, layer)
