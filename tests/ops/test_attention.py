"""softmax(q kᵀ) v on every backend against float64: values, gradients, second gradients, layouts, errors."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

from sagan_fast.functional import attention
from sagan_fast.kernels.attention import reference
from sagan_fast.testing import assert_close_to_truth, randn

BACKENDS = ("eager", "sdpa")
SHAPES = [  # B, N, M, D_QK, D_V
    (2, 64, 16, 8, 32),
    (1, 35, 12, 3, 7),  # nothing a multiple of anything
    (2, 49, 49, 12, 48),
    (3, 16, 16, 32, 8),  # D_V below D_QK
    (1, 5, 1, 1, 1),  # one key
]


def inputs(shape, generator, dtype=torch.float64):
    B, N, M, D_QK, D_V = shape
    sizes = ((B, N, D_QK), (B, M, D_QK), (B, M, D_V), (B, N, D_V))
    return [randn(*size, generator=generator).to(dtype) for size in sizes]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_reference_is_the_formula(shape, generator):
    q, k, v, _ = inputs(shape, generator)
    weights = torch.einsum("bnd,bmd->bnm", q, k).exp()
    truth = torch.einsum("bnm,bme->bne", weights / weights.sum(2, keepdim=True), v)
    torch.testing.assert_close(reference.attention(q, k, v), truth)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_gradients_match_float64(shape, dtype, backend, generator):
    q, k, v, d_out = (tensor.to(dtype) for tensor in inputs(shape, generator))
    leaves = [tensor.requires_grad_() for tensor in (q, k, v)]
    exact = [tensor.detach().double().requires_grad_() for tensor in leaves]
    truth = reference.attention(*exact)
    truths = torch.autograd.grad(truth, exact, d_out.double())
    out = attention(*leaves, backend=backend)
    eager = reference.attention(*leaves)
    assert out.dtype == dtype
    assert_close_to_truth("out", out, truth, eager)
    found = torch.autograd.grad(out, leaves, d_out)
    eagers = torch.autograd.grad(eager, leaves, d_out)
    for name, grad, exact_grad, eager_grad in zip("qkv", found, truths, eagers, strict=True):
        if dtype == torch.float32:
            assert_close_to_truth(f"d_{name}", grad, exact_grad, eager_grad)
        else:  # a sum of signed terms: the table is for values, so eager in the same dtype is the yardstick
            floor = {torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
            error = (grad.double() - exact_grad).norm()
            assert error <= 2 * (eager_grad.double() - exact_grad).norm() + floor * exact_grad.norm() + 1e-6


def test_large_logits_neither_overflow_nor_vanish(generator):
    q, k, v, _ = inputs((2, 33, 64, 16, 32), generator, torch.float32)
    q = q * 40  # logits of some hundreds
    for backend in BACKENDS:
        assert_close_to_truth(
            backend, attention(q, k, v, backend=backend), reference.attention(q.double(), k.double(), v.double()),
            reference.attention(q, k, v),
        )  # fmt: skip


def test_sdpa_keeps_scale_one_and_takes_another(generator):
    q, k, v, _ = inputs((1, 20, 10, 4, 9), generator)
    for scale in (1.0, 0.5):
        torch.testing.assert_close(attention(q, k, v, scale=scale, backend="sdpa"), reference.attention(q, k, v, scale))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck_and_gradgradcheck(backend, generator):
    leaves = [t.requires_grad_() for t in inputs((2, 6, 4, 3, 5), generator)[:3]]

    def function(q, k, v):
        return attention(q, k, v, backend=backend)

    assert gradcheck(function, leaves)
    assert gradgradcheck(function, leaves)


def test_only_the_gradients_asked_for_are_made(generator):
    q, k, v, d_out = inputs((2, 6, 4, 3, 5), generator)
    attention(q, k.requires_grad_(), v, backend="sdpa").backward(d_out)
    exact = k.detach().clone().requires_grad_()
    reference.attention(q, exact, v).backward(d_out)
    torch.testing.assert_close(k.grad, exact.grad)
    assert q.grad is None and v.grad is None


def test_sdpa_really_fuses_on_the_cpu(generator):
    """With D_QK != D_V PyTorch would fall to its math path; the profile shows the fused kernels."""
    q, k, v, d_out = (t.float().requires_grad_() for t in inputs((1, 64, 32, 8, 16), generator))
    strided = q.transpose(1, 2).contiguous().transpose(1, 2)  # rows with gaps, as a view of an NCHW map
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        attention(strided, k, v, backend="sdpa").backward(d_out)
    names = {event.key for event in profile.key_averages()}
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in names
    assert "aten::_scaled_dot_product_flash_attention_for_cpu_backward" in names
    assert not any("scaled_dot_product_attention_math" in name for name in names)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_gives_bfloat16_near_float64(backend, generator):
    q, k, v, _ = inputs((2, 64, 16, 8, 32), generator, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(q, k, v, backend=backend)
    assert out.dtype == torch.bfloat16
    truth = reference.attention(*(t.bfloat16().double() for t in (q, k, v)))
    assert_close_to_truth("out", out, truth)


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
def test_compiles_without_a_break(backend, generator):
    q, k, v, _ = inputs((2, 20, 12, 8, 16), generator, torch.float32)
    compiled = torch.compile(lambda *t: attention(*t, backend=backend), fullgraph=True, backend="aot_eager")
    leaves = [t.requires_grad_() for t in (q, k, v)]
    torch.testing.assert_close(compiled(*leaves), reference.attention(*leaves))
    compiled(*leaves).sum().backward()
    assert all(t.grad is not None for t in leaves)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_batch_gives_an_empty_result(backend):
    q, k, v = torch.zeros(0, 6, 3, requires_grad=True), torch.zeros(0, 4, 3), torch.zeros(0, 4, 5)
    out = attention(q, k, v, backend=backend)
    assert out.shape == (0, 6, 5)
    out.sum().backward()
    assert q.grad.shape == q.shape


def test_the_result_is_that_of_pytorchs_own_attention(generator):
    q, k, v, _ = inputs((2, 20, 12, 8, 16), generator)
    truth = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], scale=1.0)[:, 0]
    torch.testing.assert_close(attention(q, k, v), truth)


def test_errors_name_the_argument():
    q, k, v = torch.zeros(2, 6, 3), torch.zeros(2, 4, 3), torch.zeros(2, 4, 5)
    with pytest.raises(ValueError, match=r"attention: k must have shape \(B, M, D_QK\) = \(2, 4, 3\), got \(2, 4, 2\)"):
        attention(q, k[..., :2], v)
    with pytest.raises(ValueError, match=r"attention: v must have shape \(B, M, D_V\) = \(2, 4, 5\), got \(1, 4, 5\)"):
        attention(q, k, v[:1])
    with pytest.raises(ValueError, match=r"attention: q must have shape \(B, N, D_QK\) = 3 axes, got \(6, 3\)"):
        attention(q[0], k, v)
    with pytest.raises(TypeError, match="attention: v must have the dtype of q = torch.float32, got torch.float64"):
        attention(q, k, v.double())
