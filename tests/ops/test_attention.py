"""softmax(q kᵀ) v on every backend against float64: values, gradients, second gradients, layouts, errors."""

import os
import sys

import pytest
import torch
import torch.nn.functional as F

from sagan_fast.functional import attention
from sagan_fast.kernels.attention import reference
from shared_by_tests import assert_close_to_truth, attention_terms, randn

needs_interpreter = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="on the CPU the Triton kernels need TRITON_INTERPRET=1"
)
BACKENDS = ("eager", "sdpa", pytest.param("triton", marks=needs_interpreter))
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
    q, k, v, d_out = inputs(shape, generator)
    q *= shape[3] ** -0.5  # logits of a standard deviation of 1
    q, k, v, d_out = (tensor.to(dtype) for tensor in (q, k, v, d_out))
    leaves = [tensor.requires_grad_() for tensor in (q, k, v)]
    exact = [tensor.detach().double().requires_grad_() for tensor in leaves]
    truth = reference.attention(*exact)
    truths = torch.autograd.grad(truth, exact, d_out.double(), retain_graph=True)
    (terms,) = torch.autograd.grad(truth, exact[2:], d_out.double().abs())  # what d_v adds up, without its signs
    out = attention(*leaves, backend=backend)
    eager = reference.attention(*leaves)
    assert out.dtype == dtype
    assert_close_to_truth("out", out, truth, eager)
    found = torch.autograd.grad(out, leaves, d_out)
    eagers = torch.autograd.grad(eager, leaves, d_out)
    _, *added = attention_terms(q, k, v, d_out)
    for name, grad, exact_grad, eager_grad, single in zip("qkv", found, truths, eagers, added, strict=True):
        if dtype == torch.float32:
            assert_close_to_truth(f"d_{name}", grad, exact_grad, eager_grad, terms=single)
        else:  # a sum of signed terms: the table is for values, so eager in the same dtype is the yardstick
            floor = {torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
            error, size = (grad.double() - exact_grad).norm(), (terms if name == "v" else exact_grad).norm()
            assert error <= 2 * (eager_grad.double() - exact_grad).norm() + floor * size + 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_logits_neither_overflow_nor_vanish(backend, generator):
    q, k, v, _ = inputs((2, 33, 64, 16, 32), generator, torch.float32)
    q = q * 40  # logits of some hundreds
    truth = reference.attention(q.double(), k.double(), v.double())
    assert_close_to_truth("out", attention(q, k, v, backend=backend), truth)


def test_sdpa_keeps_scale_one_and_takes_another(generator):
    q, k, v, _ = inputs((1, 20, 10, 4, 9), generator)
    for scale in (1.0, 0.5):
        torch.testing.assert_close(attention(q, k, v, scale=scale, backend="sdpa"), reference.attention(q, k, v, scale))


def test_only_the_gradients_asked_for_are_made(generator):
    q, k, v, d_out = inputs((2, 6, 4, 3, 5), generator)
    attention(q, k.requires_grad_(), v, backend="sdpa").backward(d_out)
    exact = k.detach().clone().requires_grad_()
    reference.attention(q, exact, v).backward(d_out)
    torch.testing.assert_close(k.grad, exact.grad)
    assert q.grad is None and v.grad is None


def test_sdpa_really_fuses_on_the_cpu(generator):
    """With D_QK != D_V PyTorch would fall to its math path; the profile shows the fused kernels.

    In bfloat16: single precision goes in chunks, tests/kernels/attention/test_cpu.py.
    """
    q, k, v, d_out = (t.bfloat16().requires_grad_() for t in inputs((1, 64, 32, 8, 16), generator))
    strided = q.transpose(1, 2).contiguous().transpose(1, 2)  # rows with gaps, as a view of an NCHW map
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        attention(strided, k, v, backend="sdpa").backward(d_out)
    names = {event.key for event in profile.key_averages()}
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in names
    assert "aten::_scaled_dot_product_flash_attention_for_cpu_backward" in names
    assert not any("scaled_dot_product_attention_math" in name for name in names)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_gives_its_dtype_near_float64(dtype, backend, generator):
    q, k, v, _ = inputs((2, 64, 16, 8, 32), generator, torch.float32)
    with torch.autocast("cpu", dtype):
        out = attention(q, k, v, backend=backend)
    assert out.dtype == dtype
    truth = reference.attention(*(t.to(dtype).double() for t in (q, k, v)))
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
    with pytest.raises(ValueError, match=r"attention: q must have 3 axes \(B, N, D_QK\), got shape \(6, 3\)"):
        attention(q[0], k, v)
    with pytest.raises(TypeError, match="attention: v must have the dtype of q, torch.float32, got torch.float64"):
        attention(q, k, v.double())


@needs_interpreter
def test_triton_keeps_no_map_for_backward(generator):
    leaves = [t.requires_grad_() for t in inputs((2, 96, 64, 3, 7), generator, torch.float32)[:3]]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = attention(*leaves, backend="triton")
    assert sum(t.numel() for t in kept) == sum(t.numel() for t in leaves) + out.numel() + 2 * 96


def test_triton_refuses_by_name_what_it_cannot_do(monkeypatch):
    q, k, v = torch.zeros(1, 4, 65), torch.zeros(1, 4, 65), torch.zeros(1, 4, 8)
    with pytest.raises(ValueError, match=r"attention: backend must .*'sdpa'.* D_QK = 65, D_V = 8 .* 64 and 256"):
        attention(q, k, v, backend="triton")
    if "triton.runtime.interpreter" in sys.modules:
        monkeypatch.setattr("triton.runtime.interpreter.computes_bfloat16", False)
    with pytest.raises(RuntimeError, match=r"attention: backend must .*, got 'triton': "):
        attention(*(t[..., :8].bfloat16() for t in (q, k, v)), backend="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_on_a_gpu_auto_is_triton_and_matches_float64(dtype, generator):
    leaves = [t.to("cuda", dtype).requires_grad_() for t in inputs((2, 300, 130, 24, 96), generator)[:3]]
    leaves[0].data *= 24**-0.5
    found, eager = attention(*leaves), reference.attention(*leaves)
    truth = reference.attention(*(t.double() for t in leaves))
    assert "Attention" in type(found.grad_fn).__name__
    assert_close_to_truth("out", found, truth, eager)
    found.square().sum().backward()
    assert all(t.grad.isfinite().all() for t in leaves)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("backend", ["eager", "auto"])
def test_scores_above_float16s_largest_number(generator, backend, autocast):
    q, k, v = (torch.randn(1, n, d, generator=generator) for n, d in ((5, 32), (9, 32), (9, 16)))
    q, k, v = (t.half().float() for t in (q * 90, k * 90, v))
    assert torch.bmm(q, k.mT).abs().max() > 65504
    with torch.autocast("cpu", torch.float16, enabled=autocast):
        found = attention(*(t if autocast else t.half() for t in (q, k, v)), backend=backend)
    truth = attention(q.double(), k.double(), v.double(), backend="eager")
    assert (found.double() - truth).abs().max() < 2e-3


@pytest.mark.parametrize("M", [1, 2, 7, 15, 16, 17])
@pytest.mark.parametrize("backend", ["eager", "sdpa", "auto"])
def test_a_nan_shows_however_few_keys_there_are(generator, backend, M):
    q, k, v = (torch.randn(1, n, 8, generator=generator) for n in (4, M, M))
    q[0, 1, 3] = float("nan")
    for inputs in ((q, k, v), (q.clone().requires_grad_(True), k, v)):
        assert attention(*inputs, backend=backend).isnan().any(2)[0].tolist() == [False, True, False, False]
