"""A new run from the weights of another."""

import pytest
import torch

from sagan_fast.errors import InputError
from sagan_fast.training.config import TrainConfig
from sagan_fast.training.initialize import class_order, initialize
from sagan_fast.training.state import new_state

CPU = torch.device("cpu")


def state_of(seed, **overrides):
    narrow = {"base_channels": 2}
    options = {"generator": narrow, "discriminator": narrow, "num_classes": 3, "seed": seed, **overrides}
    config = TrainConfig.from_preset("shapes-32", out="x", **options)
    return new_state(config, CPU), config


def saved(seed, names, **overrides):
    state, config = state_of(seed, **overrides)
    with torch.no_grad():
        for network in (state.generator, state.ema):
            for block in network.blocks:
                block.norm1.gain.weight.normal_()
    return state, {**state.state_dict(), "config": config.to_dict(), "class_names": names, "step": 7}


def outputs(state, y):
    z = torch.randn(len(y), 128, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        images = state.ema(z, y)
        return images, state.discriminator.eval()(images, y)


def test_all_weights_are_taken_and_what_was_not_is_said(tmp_path):
    old, content = saved(1, ["a", "b", "c"])
    new, _ = state_of(2)
    said = initialize(new, content, ["a", "b", "c"], tmp_path / "last.pt")
    assert said == [f"weights from {tmp_path / 'last.pt'}, step 7; the optimizers begin anew"] and new.step == 0
    y = torch.tensor([0, 1, 2])
    for mine, theirs in zip(outputs(new, y), outputs(old, y), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_classes_go_by_name_and_new_ones_begin_as_the_mean():
    old, content = saved(1, ["a", "b", "c"])
    new, _ = state_of(2, num_classes=2)
    said = initialize(new, content, ["new", "a"], "last.pt")
    assert said[1:] == [
        "classes that it does not have begin as the mean of its classes: new",
        "its classes that the data does not have are left out: b, c",
    ]
    mine, theirs = outputs(new, torch.tensor([1])), outputs(old, torch.tensor([0]))
    torch.testing.assert_close(mine[0], theirs[0])
    gain = old.generator.blocks[0].norm1.gain.weight
    torch.testing.assert_close(new.generator.blocks[0].norm1.gain.weight, torch.stack([gain.mean(0), gain[0]]))
    table = new.discriminator.embedding.parametrizations.weight
    assert table[0]._u.shape == (2,) and torch.isfinite(outputs(new, torch.tensor([0, 1]))[1]).all()


def test_another_size_takes_what_fits():
    _, content = saved(1, ["a", "b", "c"])
    new, _ = state_of(2, generator={"base_channels": 2, "channel_multipliers": [8, 4, 2, 2]})
    said = initialize(new, content, ["a", "b", "c"], "last.pt")
    assert "did not fit and begin anew: generator.blocks.2." in said[1]
    torch.testing.assert_close(new.generator.linear.bias, content["generator"]["linear.bias"])
    other, _ = state_of(2, generator={"base_channels": 3}, discriminator={"base_channels": 2})
    del content["generator"]
    content["generator"] = {"elsewhere": torch.zeros(2)}
    with pytest.raises(InputError, match=r"no weight in last\.pt fits the generator of this run"):
        initialize(other, content, ["a", "b", "c"], "last.pt")


def test_classes_without_names_go_by_number_where_there_are_as_many():
    assert class_order([], ["a", "b"], 2) is None and class_order([], ["a", "b"], 3) == [None, None]
    assert class_order(["b", "a"], ["a", "c"], 2) == [1, None] and class_order(["a"], [], 1) is None
