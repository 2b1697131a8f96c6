import pytest
import torch

from sagan_fast.errors import InputError
from sagan_fast.interop.layouts import LAYOUTS, layout_of


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))
def test_every_layout_names_every_part(layout):
    shared = {"conv1", "conv2", "shortcut", "theta", "phi", "g", "o", "gamma", "linear"}
    assert set(layout.generator) == shared | {"norm1", "norm2", "tail", "last"}
    assert set(layout.discriminator) == shared | {"embedding"}


def test_attentions_are_counted_among_the_blocks():
    keys = ("blocks.0.0.conv2d1.weight", "blocks.1.0.conv1x1_theta.weight_orig", "blocks.2.0.conv2d1.weight")
    state = dict.fromkeys(keys, torch.zeros(1))
    assert LAYOUTS["studiogan"].blocks(state, True) == (["blocks.0.0", "blocks.2.0"], {0: "blocks.1.0"})
    first = {"blocks.0.0.conv1x1_theta.weight": torch.zeros(1)}
    with pytest.raises(InputError, match="must follow a block"):
        LAYOUTS["studiogan"].blocks(first, True)


def test_known_networks_that_do_not_fit_say_why():
    for key, why in (
        ("l1.0.module.weight_bar", "DCGAN"), ("blocks.0.conv1.parametrizations.weight.original", "load_state_dict"),
        ("block2.c1.weight", "bilinearly"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=why):
            layout_of({key: torch.zeros(1)}, None)
