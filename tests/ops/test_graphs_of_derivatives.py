"""Derivatives of graphs recorded elsewhere, and inputs at the edges: batches, ties, empty tensors, autocast."""

import os

import pytest
import torch
from block_by_hand import arguments, leaves_of
from torch import nn
from torch.autograd import forward_ad
from torch.autograd.functional import hessian, jacobian
from torch.func import jvp, vmap

from sagan_fast import spectral_norm
from sagan_fast.functional import attention, self_attention_2d
from sagan_fast.kernels.attention import reference
from sagan_fast.ops.attention import attention_on
from shared_by_tests import randn

needs_interpreter = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="on the CPU the Triton kernels need TRITON_INTERPRET=1"
)
BACKENDS = ("eager", "sdpa", "cpu", pytest.param("triton", marks=needs_interpreter))


def inputs(generator, B=1, N=3, M=2, dtype=torch.float64):
    """Return q, k, v, d_out and a tangent of q."""
    sizes = ((B, N, 3), (B, M, 3), (B, M, 4), (B, N, 4), (B, N, 3))
    return [randn(*size, generator=generator).to(dtype) for size in sizes]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batched_backward_keeps_its_graph(backend, generator):
    """`vectorize=True` makes batches by PyTorch's old vmap; with `create_graph` they have a derivative."""
    q, k, v, _, _ = inputs(generator)

    def loss(function, vectorize):
        leaf = q.clone().requires_grad_()
        first = jacobian(lambda q: function(q, k, v), leaf, create_graph=True, vectorize=vectorize)
        second = hessian(lambda q: function(q, k, v).sum(), leaf, create_graph=True, vectorize=vectorize)
        total = first.square().sum() + second.square().sum() + leaf.sum()  # so that a lost graph is no error
        return torch.autograd.grad(total, leaf)[0]

    found = loss(lambda *t: attention_on(backend, *t, 1.0), True)
    torch.testing.assert_close(found, loss(reference.attention, False))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tangent_of_the_gradient_that_arrives(backend, generator):
    """The graph is older than the dual level."""
    q, k, v, d_out, _ = inputs(generator)
    leaf = q.clone().requires_grad_()
    out = attention_on(backend, leaf, k, v, 1.0)
    with forward_ad.dual_level():
        (dual,) = torch.autograd.grad(out, leaf, forward_ad.make_dual(d_out, 2 * d_out))
        value, tangent = forward_ad.unpack_dual(dual)
    torch.testing.assert_close(tangent, 2 * value)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", [(0, 3, 2), (2, 0, 3), (2, 3, 0)])
def test_empty_tensors_have_all_derivatives(sizes, backend, generator):
    q, k, v, d_out, t_q = inputs(generator, *sizes)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    out = attention_on(backend, *leaves, 1.0)
    first = torch.autograd.grad(out, leaves, d_out, create_graph=True)
    second = torch.autograd.grad([g.sum() for g in first], leaves, allow_unused=True)
    _, tangent = jvp(lambda q: attention_on(backend, q, k.detach(), v.detach(), 1.0), (q.detach(),), (t_q,))
    found = [out, *first, tangent, *(g for g in second if g is not None)]
    assert all(not t.any() for t in found) and out.shape == tangent.shape == d_out.shape


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_second_backward_needs_retain_graph(backend, generator):
    q, k, v, d_out, _ = inputs(generator)
    out = attention_on(backend, q.requires_grad_(), k, v, 1.0)
    out.backward(d_out)
    with pytest.raises(RuntimeError, match="second time"):
        out.backward(d_out)


@pytest.mark.parametrize("backend", ["eager", "sdpa", "auto", BACKENDS[3]])
def test_transforms_under_autocast_give_its_dtype(backend, generator):
    q, k, v, _, t_q = inputs(generator, 2, 20, 12, torch.float32)
    with torch.autocast("cpu", torch.float16):
        plain = attention(q, k, v, backend=backend)
        out, tangent = jvp(lambda q: attention(q, k, v, backend=backend), (q,), (t_q,))
    assert plain.dtype == out.dtype == tangent.dtype == torch.float16
    exact = [t.half().double() for t in (q, k, v, t_q)]
    _, truth = jvp(lambda q: reference.attention(q, *exact[1:3]), (exact[0],), (exact[3],))
    assert (tangent.double() - truth).norm() <= 2e-2 * truth.norm()


@pytest.mark.parametrize("backend", ["sdpa", BACKENDS[3]])
def test_inputs_made_of_one_another_count_once(backend, generator):
    """A block whose gamma and w_g come from x, and whose biases are one tensor, differentiated with a graph."""
    made = arguments((2, 8, 4, 6, 2, 4), generator)

    def gradients(backend):
        leaves = leaves_of(made)
        given = leaves | {
            "gamma": leaves["x"].mean(),
            "w_g": leaves["w_g"] * leaves["x"].square().mean(),
            "b_phi": leaves["b_theta"],
        }
        wanted = [leaves["x"], leaves["b_theta"], leaves["w_g"]]
        y = self_attention_2d(**given, backend=backend)
        first = torch.autograd.grad(y.square().sum(), wanted, create_graph=True)
        return [*first, *torch.autograd.grad(sum(g.square().sum() for g in first), wanted)]

    torch.testing.assert_close(gradients(backend), gradients("eager"))


@pytest.mark.parametrize("backend", ["eager", "sdpa", BACKENDS[3]])
def test_vmap_takes_maps_of_any_strides(backend, generator):
    made = arguments((2, 8, 4, 6, 2, 4), generator)
    x = made.pop("x").contiguous(memory_format=torch.channels_last)
    together = self_attention_2d(x, **made, backend=backend)
    each = vmap(lambda image: self_attention_2d(image[None], **made, backend=backend)[0])(x)
    torch.testing.assert_close(each, together)


def test_an_exported_spectral_norm_keeps_its_gradients(generator):
    net = spectral_norm(nn.Linear(6, 5)).eval()
    x = randn(3, 6, generator=generator).float()
    exported = torch.export.export(net, (x,)).module()
    torch.testing.assert_close(exported(x), net(x))
    for model in (net, exported):
        model(x).square().sum().backward()
    found = dict(exported.named_parameters())["parametrizations.weight.original"].grad
    torch.testing.assert_close(found, net.parametrizations.weight.original.grad)


@pytest.mark.parametrize("backend", ["sdpa", BACKENDS[3]])
def test_a_graph_over_a_compiled_function_is_refused(backend, generator):
    """A second derivative of what torch.compile compiled raises; it is never silently another number."""
    q, k, v, _, _ = inputs(generator)
    torch._dynamo.reset()
    compiled = torch.compile(lambda q: attention(q, k, v, backend=backend), backend="aot_eager")
    (first,) = torch.autograd.grad(compiled(q.requires_grad_()).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        first.square().sum().backward()
