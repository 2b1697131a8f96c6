"""Every peer is called so that it computes softmax(q kᵀ) v, no scale, also of 12 channels.

Libraries that need a GPU are replaced by functions with their signatures, checks of widths and layouts.
"""

import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from benchmarks import peers_attention
from sagan_fast.kernels.attention import reference


def of_eight(q, k, v, scale):
    """Attention as a library wants it: (B, rows, 1, D), no gaps within a row, widths in multiples of 8."""
    assert all(t.ndim == 4 and t.shape[2] == 1 and t.stride(3) == 1 and t.shape[3] % 8 == 0 for t in (q, k, v))
    return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), scale=scale).transpose(1, 2)


def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None):
    return of_eight(query, key, value, scale)


def flash_attn_func(q, k, v, softmax_scale=None):
    return of_eight(q, k, v, softmax_scale), None


@pytest.fixture
def libraries(monkeypatch):
    ops = SimpleNamespace(memory_efficient_attention=memory_efficient_attention)
    monkeypatch.setitem(sys.modules, "xformers", SimpleNamespace(ops=ops))
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "flash_attn.cute", SimpleNamespace(flash_attn_func=flash_attn_func))
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)


@pytest.mark.parametrize("D_QK", [12, 24])
@pytest.mark.parametrize("name", ["sdpa", "padded", "flex", "flash_attention_4", "xformers"])
def test_peers_are_the_reference(name, D_QK, generator, libraries):
    peer = getattr(peers_attention, name)
    core = peer if name in ("sdpa", "padded") else peer()
    q, k, v = (torch.randn(2, n, d, generator=generator) for n, d in ((64, D_QK), (16, D_QK), (16, 48)))
    torch.testing.assert_close(core(q, k, v), reference.attention(q, k, v))


def test_what_is_not_installed_is_an_import_error(monkeypatch):
    for module in ("xformers", "flash_attn"):
        monkeypatch.setitem(sys.modules, module, None)
    for peer in (peers_attention.xformers, peers_attention.flash_attention_4):
        with pytest.raises(ImportError):
            peer()
