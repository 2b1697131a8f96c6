"""Protocols: presets, overrides, and what is refused."""

import dataclasses

import pytest

from sagan_fast.errors import InputError
from sagan_fast.evaluation.protocol import PRESETS, Protocol, versions


def test_presets_say_what_the_papers_did():
    official, clean = Protocol.preset("official"), Protocol.preset("clean")
    assert (official.count, official.reference_count, official.splits) == (50_000, 50_000, 1)
    assert (official.feature_resize, official.quantise) == ("tf1-bilinear", "none")
    assert (clean.count, clean.reference_count, clean.splits) == (50_000, None, 10)
    assert (clean.feature_resize, clean.quantise) == ("antialias-bicubic", "uint8")
    assert {official.batch_norm, clean.batch_norm} == {"running"}
    assert set(PRESETS) == {"official", "clean"}


def test_overrides_leave_the_rest():
    changed = Protocol.preset("official", splits=5, seed=None)
    assert changed == dataclasses.replace(Protocol.preset("official"), splits=5) and changed.name == "official"


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("paper", {}, "protocol must be one of clean, official, got 'paper'"),
        ("clean", {"count": 1}, "count must be at least 2"),
        ("clean", {"splits": 0}, "splits must be at least 1"),
        ("clean", {"quantise": "int4"}, "quantise must be one of uint8, none"),
        ("clean", {"batch_norm": "train"}, "batch_norm must be one of running, batch, standing"),
        ("clean", {"feature_resize": "area"}, "feature_resize must be one of"),
        ("clean", {"weights": "ema"}, "weights must be one of average, last"),
        ("clean", {"reference_count": 1}, "reference_count must be at least 2"),
    ],
)
def test_bad_protocols(name, overrides, message):
    with pytest.raises(InputError, match=message):
        Protocol.preset(name, **overrides)


def test_versions_are_those_of_what_touches_the_numbers():
    assert set(versions()) == {"sagan_fast", "torch", "numpy", "pillow", "python"}


def test_each_split_needs_an_image():
    with pytest.raises(InputError, match="splits must be at most the count, got 10 for 5 images"):
        Protocol.preset("clean", count=5).check_splits()  # only IS needs them
    Protocol.preset("clean", count=10).check_splits()
