"""The choice of a backend: by size on the CPU, never replaced when asked for by name."""

import logging

import pytest
import torch

from sagan_fast.functional import attention
from sagan_fast.ops.backends import choose


def test_auto_on_the_cpu_goes_by_size():
    q = torch.zeros(1)
    assert choose("attention", "auto", q, 8, 256, 64, 8, 32).backend == "eager"
    assert choose("attention", "auto", q, 4, 4096, 4096, 8, 64).backend == "blocks"
    assert choose("attention", "auto", q.bfloat16(), 4, 4096, 4096, 8, 64).backend == "sdpa"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert choose("attention", "auto", q, 4, 4096, 4096, 8, 64).backend == "sdpa"
    assert "4096 x 4096" in choose("attention", "auto", q, 4, 4096, 4096, 8, 64).reason


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_a_named_backend_is_taken(backend):
    choice = choose("attention", backend, torch.zeros(1), 4, 4096, 4096, 8, 64)
    assert choice.backend == backend and "asked for" in str(choice)


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match=r"attention: backend must be one of = .*'sdpa'.*got 'flash'"):
        choose("attention", "flash", torch.zeros(1), 1, 1, 1, 1, 1)


def test_the_choice_is_logged_at_debug_level(caplog):
    with caplog.at_level(logging.DEBUG, logger="sagan_fast"):
        choose("attention", "auto", torch.zeros(1), 8, 256, 64, 8, 32)
    assert "attention: eager" in caplog.text


def test_shapes_alone_can_be_computed():
    """On the device meta, which has no autocast."""
    q, v = torch.empty(4, 4096, 8, device="meta"), torch.empty(4, 4096, 64, device="meta")
    assert choose("attention", "auto", q, 4, 4096, 4096, 8, 64).backend == "sdpa"
    assert attention(q, q, v).shape == v.shape
