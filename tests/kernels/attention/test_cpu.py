"""Attention in chunks: every way of cutting the maps gives float64's values and gradients, and no map is kept."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sagan_fast.kernels import LOG2_E
from sagan_fast.kernels.attention import chunks, cpu, reference
from sagan_fast.ops.attention import on_the_cpu
from shared_by_tests import assert_close_to_truth, attention_terms, randn

SHAPES = [  # B, N, M, D_QK, D_V
    (2, 96, 64, 8, 32),
    (5, 35, 12, 3, 7),
    (1, 50, 33, 12, 4),
    (3, 16, 16, 32, 8),
    (1, 5, 1, 1, 1),
]


@pytest.fixture(params=[1, 2, 3], ids="{} threads".format)
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def inputs(shape, generator, dtype=torch.float32):
    B, N, M, D_QK, D_V = shape
    sizes = ((B, N, D_QK), (B, M, D_QK), (B, M, D_V), (B, N, D_V))
    return [randn(*size, generator=generator).to(dtype) for size in sizes]


@pytest.mark.parametrize("chunk_scores", [1, 200, 5000, 10**6])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_cut_gives_the_values_and_gradients_of_float64(shape, chunk_scores, threads, generator, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_SCORES", chunk_scores)
    q, k, v, d_out = inputs(shape, generator)
    q = q.transpose(1, 2).contiguous().transpose(1, 2)  # as a view of an NCHW map
    exact = [t.double().requires_grad_() for t in (q, k, v)]
    truth = reference.attention(*exact, 0.7)
    truths = torch.autograd.grad(truth, exact, d_out.double())
    out, lse = cpu.attention_fwd(q, k, v, 0.7)
    assert_close_to_truth("out", out, truth)
    found = cpu.attention_bwd(d_out, q, k, v, out, lse, 0.7)
    _, *terms = attention_terms(q, k, v, d_out, 0.7)
    for name, grad, exact_grad, added in zip("qkv", found, truths, terms, strict=True):
        assert_close_to_truth(f"d_{name}", grad, exact_grad, terms=added)


def test_large_logits_neither_overflow_nor_vanish(generator):
    q, k, v, _ = inputs((2, 33, 64, 16, 32), generator)
    q, k = q * 20, k * 2
    leaves = [t.requires_grad_() for t in (q, k, v)]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    found, truth = on_the_cpu(*leaves), reference.attention(*exact)
    assert_close_to_truth("out", found, truth)
    found.sum().backward()
    assert all(t.grad.isfinite().all() for t in leaves)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("share", [0.99, 1.01])
def test_scores_on_both_sides_of_where_the_largest_is_taken_off(share, sign, generator):
    q, k, v, _ = inputs((2, 33, 64, 16, 32), generator)
    q, k = sign * q.abs(), k.abs()  # all rows far from zero, on one side
    q *= share * cpu.SMALL / LOG2_E / (q.norm(dim=-1).amax() * k.norm(dim=-1).amax())
    out, lse = cpu.attention_fwd(q, k, v)
    scores = q.double() @ k.double().mT
    assert_close_to_truth("out", out, scores.softmax(-1) @ v.double(), reference.attention(q, k, v))
    exact = torch.logsumexp(scores, -1, keepdim=True) * LOG2_E
    torch.testing.assert_close(lse.double(), exact, rtol=1e-5, atol=1e-5)
    q[1, 3, 0] = torch.nan
    out, _ = cpu.attention_fwd(q, k, v)
    assert out[1, 3].isnan().all() and out[0].isfinite().all()


def test_neither_a_map_nor_a_padded_copy_is_kept(generator):
    leaves = [t.requires_grad_() for t in inputs((2, 96, 64, 8, 32), generator)[:3]]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = on_the_cpu(*leaves)
    assert sum(t.numel() for t in kept) == sum(t.numel() for t in leaves) + out.numel() + 2 * 96


def test_what_it_cannot_do_goes_to_pytorch(generator):
    q, k, v, _ = inputs((1, 8, 4, 3, 5), generator)
    assert cpu.supports(q, k, v)
    assert not cpu.supports(q.half(), k.half(), v.half())
    assert not cpu.supports(q[:0], k[:0], v[:0])
    with torch.autocast("cpu", torch.bfloat16):
        assert not cpu.supports(q, k, v)
    with FlopCounterMode(display=False):
        assert not cpu.supports(q, k, v)  # it would not see the other threads


def test_inference_mode_and_other_threads_of_the_user(generator):
    q, k, v, _ = inputs((4, 96, 64, 8, 32), generator)
    truth = reference.attention(q, k, v)
    with torch.inference_mode():
        torch.testing.assert_close(on_the_cpu(q, k, v), truth)
    with ThreadPoolExecutor(3) as pool:
        for out in pool.map(lambda _: on_the_cpu(q, k, v), range(6)):
            torch.testing.assert_close(out, truth)
