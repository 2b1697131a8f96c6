"""What options may be, and a sentence for what they may not."""

import dataclasses
from typing import get_args

import pytest

from sagan_fast import choices
from sagan_fast.choices import Device, OnBroken, check_choice, check_choices
from sagan_fast.errors import InputError
from sagan_fast.ops.backends import BACKENDS


@dataclasses.dataclass
class Config:
    device: Device = "auto"
    count: int = 3
    on_broken: OnBroken = "fail"


def test_a_value_that_is_no_choice_is_a_sentence():
    check_choice("device", "cpu", Device)
    with pytest.raises(InputError, match="^device must be one of auto, cpu, cuda, mps, got 'tpu'$"):
        check_choice("device", "tpu", Device)
    check_choices(Config(count="many"))
    with pytest.raises(InputError, match="^on_broken must be one of fail, skip, got None$"):
        check_choices(Config(on_broken=None))


def test_the_backends_are_those_of_the_ops():
    assert get_args(choices.Backend) == BACKENDS
