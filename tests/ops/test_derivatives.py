"""Second derivatives, tangents and transforms of attention on every backend, against the reference in float64."""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from sagan_fast import SelfAttention2d, explain, fuse_spectral_norm, spectral_norm
from sagan_fast.functional import spectral_norm_group
from sagan_fast.kernels.attention import chunks, reference
from sagan_fast.ops.attention import attention, attention_on
from shared_by_tests import randn

needs_interpreter = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="on the CPU the Triton kernels need TRITON_INTERPRET=1"
)
BACKENDS = ("eager", "sdpa", "cpu", pytest.param("triton", marks=needs_interpreter))
SHAPE = (2, 9, 6, 3, 5)


def inputs(shape, generator, dtype=torch.float64):
    """Return q, k, v, d_out, and tangents of q, k and v."""
    B, N, M, D_QK, D_V = shape
    sizes = ((B, N, D_QK), (B, M, D_QK), (B, M, D_V), (B, N, D_V))
    return [randn(*size, generator=generator).to(dtype) for size in (*sizes, *sizes[:3])]


def on(backend, scale=0.7):
    """Return attention on `backend`; "cpu" is what "auto" takes for large maps there."""
    return lambda q, k, v: attention_on(backend, q, k, v, scale)


def plain(q, k, v):
    return reference.attention(q, k, v, 0.7)


@pytest.mark.parametrize(
    "backend", [*BACKENDS[:3], pytest.param("triton", marks=[needs_interpreter, pytest.mark.slow])]
)
@settings(max_examples=2, deadline=None)
@given(
    shape=st.tuples(*(st.integers(1, most) for most in (2, 6, 5, 4, 4))),
    scale=st.sampled_from([1.0, 0.5, -0.3]),
    seed=st.integers(0, 2**31),
)
def test_checks_of_first_and_second_derivatives(backend, shape, scale, seed):
    leaves = [t.requires_grad_() for t in inputs(shape, torch.Generator().manual_seed(seed))[:3]]
    function, fast = on(backend, scale), backend == "triton"
    assert gradcheck(function, leaves, fast_mode=fast, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(function, leaves, fast_mode=fast, check_fwd_over_rev=True, check_batched_grad=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_transforms_give_what_the_reference_gives(backend, generator):
    q, k, v, d_out, *tangents = inputs(SHAPE, generator)
    qkv = (q, k, v)

    def penalty(function):
        return lambda *t: (function(*t) * d_out).sum()

    def uses(f):
        first = grad(penalty(f), (0, 1, 2))
        most = {
            "jvp": jvp(f, qkv, tuple(tangents)),
            "jvp of grad": jvp(first, qkv, tuple(tangents)),
            "grad of jvp": grad(lambda *t: jvp(f, t, tuple(tangents))[1].square().sum(), (0, 1, 2))(*qkv),
            "grad of grad": grad(lambda *t: sum(g.square().sum() for g in first(*t)), (0, 1, 2))(*qkv),
            "vmap of grad": vmap(first, (0, None, None))(torch.stack([q, 2 * q]), k, v),
            "vmap of jvp": vmap(lambda t: jvp(lambda q: f(q, k, v), (q,), (t,))[1])(torch.stack([q, 2 * q])),
        }
        return (
            most
            if backend == "triton"
            else most
            | {  # the interpreter is slow
                "jvp of q alone": jvp(lambda q: f(q, k, v), (q,), (tangents[0],)),
                "vjp": vjp(f, *qkv)[1](d_out),
                "jvp of jvp": jvp(lambda *t: jvp(f, t, tuple(tangents))[1], qkv, tuple(tangents)),
                "third": grad(lambda v: hessian(lambda q: penalty(f)(q, k, v))(q).square().sum())(v),
                "vmap": vmap(f, (0, None, 1))(torch.stack([q, 2 * q]), k, torch.stack([v, -v], 1)),
                "jacfwd": jacfwd(lambda k: f(q[:, :2], k, v))(k),
                "jacrev": jacrev(lambda k: f(q[:, :2], k, v))(k),
            }
        )

    found, truth = uses(on(backend)), uses(plain)
    for name in found:
        torch.testing.assert_close(found[name], truth[name], msg=lambda said, name=name: f"{name}: {said}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("threads", [1, 2])
def test_dual_numbers_carry_their_tangent(threads, backend, generator):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)  # with two, chunks are shared with threads that have modes of their own
    try:
        dual_numbers_carry_their_tangent(backend, generator)
    finally:
        torch.set_num_threads(before)


def dual_numbers_carry_their_tangent(backend, generator):
    q, k, v, _, t_q, t_k, _ = inputs(SHAPE, generator)
    with forward_ad.dual_level():
        duals = forward_ad.make_dual(q, t_q), forward_ad.make_dual(k, t_k), v
        value, tangent = forward_ad.unpack_dual(on(backend)(*duals))
    truth, truth_tangent = jvp(lambda q, k: plain(q, k, v), (q, k), (t_q, t_k))
    torch.testing.assert_close(value, truth)
    torch.testing.assert_close(tangent, truth_tangent)


def test_a_tangent_is_not_lost_where_auto_computes_in_other_threads(generator):
    q, k, v, _, *tangents = inputs((2, 2048, 2048, 2, 4), generator, torch.float32)
    exact = [t.double() for t in (q, k, v)], [t.double() for t in tangents]
    _, found = jvp(attention, (q, k, v), tuple(tangents))
    _, truth = jvp(reference.attention, tuple(exact[0]), tuple(exact[1]))
    assert (found.double() - truth).norm() <= 1e-5 * truth.norm() and truth.norm() > 1


@pytest.mark.parametrize("backend", ["auto", *BACKENDS[:2], BACKENDS[3]])
def test_heads_are_attention_of_each_head(backend, generator):
    B, H, N, M, D_QK, D_V = 2, 3, 9, 6, 5, 4
    sizes = ((B, N, H, D_QK), (B, H, M, D_QK), (B, H, M, D_V))
    q, k, v = (randn(*size, generator=generator) for size in sizes)
    q = q.transpose(1, 2)  # as attention layers have it
    truth = torch.stack([reference.attention(q[:, h], k[:, h], v[:, h], 0.7) for h in range(H)], 1)
    torch.testing.assert_close(attention(q, k, v, scale=0.7, backend=backend), truth)
    with pytest.raises(ValueError, match=r"attention: k must have shape \(B, H, M, D_QK\) = \(2, 3, 6, 5\), got"):
        attention(q, k[:, :2], v, backend=backend)
    assert explain(q, k, v).startswith("attention: eager (6 maps of 9 x 6")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_jvp_keeps_the_tangent(backend, generator):
    q, k, v, _, *tangents = inputs((2, 20, 12, 8, 16), generator, torch.float32)

    def use(*t):
        return jvp(on(backend), t, tuple(tangents))[1]

    torch._dynamo.reset()
    found = torch.compile(use, fullgraph=True, backend="aot_eager")(q, k, v)
    torch.testing.assert_close(found, use(q, k, v), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pool", [True, False], ids=["pooled", "unpooled"])
@pytest.mark.parametrize("backend", ["auto", *BACKENDS[:2], BACKENDS[3]])
def test_the_block_under_transforms(backend, pool, generator):
    """Tangents of the input and of all parameters against central differences, and gradients of each image."""
    block = SelfAttention2d(8, pool=pool, bias=True, backend=backend).double()
    x, t_x = (randn(2, 8, 4, 6, generator=generator) for _ in range(2))
    parameters = {name: randn(*p.shape, generator=generator) for name, p in block.named_parameters()}
    tangents = {name: randn(*p.shape, generator=generator) for name, p in parameters.items()}

    def function(parameters, x):
        return functional_call(block, parameters, (x,))

    _, found = jvp(function, (parameters, x), (tangents, t_x))
    step = 1e-6
    ends = [
        function({n: p + s * tangents[n] for n, p in parameters.items()}, x + s * t_x).detach() for s in (step, -step)
    ]
    assert (found - (ends[0] - ends[1]) / (2 * step)).norm() <= 1e-6 * found.norm()

    def of_one(parameters, image):
        return function(parameters, image[None]).square().sum()

    each = vmap(grad(of_one), (None, 0))(parameters, x)
    whole = grad(lambda p: function(p, x).square().sum())(parameters)
    torch.testing.assert_close({name: g.sum(0) for name, g in each.items()}, whole)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_spectral_norm_carries_a_tangent(training, fused, generator):
    """Under a transform W/sigma is taken with u and v as they are: nothing can be written in place there."""
    net = nn.Sequential(spectral_norm(nn.Linear(6, 5)), spectral_norm(nn.Linear(5, 4))).double()
    if fused:
        fuse_spectral_norm(net).step()
    net.train(training)
    x = randn(3, 6, generator=generator)
    parameters = {name: p.detach() for name, p in net.named_parameters()}
    tangents = {name: randn(*p.shape, generator=generator) for name, p in parameters.items()}
    before = {name: b.clone() for name, b in net.named_buffers()}

    def function(parameters):
        return functional_call(net, parameters, (x,))

    _, found = jvp(function, (parameters,), (tangents,))
    exact = grad(lambda p: function(p).square().sum())(parameters)
    assert all(torch.equal(b, before[name]) for name, b in net.named_buffers())
    net.eval()
    step = 1e-6
    ends = [function({n: p + s * tangents[n] for n, p in parameters.items()}).detach() for s in (step, -step)]
    assert (found - (ends[0] - ends[1]) / (2 * step)).norm() <= 1e-6 * found.norm()
    net(x).square().sum().backward()
    torch.testing.assert_close(exact, {name: p.grad for name, p in net.named_parameters()})
    with pytest.raises(RuntimeError, match="update must be False under torch.func and forward-mode AD, got True"):
        grad(lambda w: spectral_norm_group([w], [w.new_ones(3)], [w.new_ones(2)])[0].sum())(torch.ones(3, 2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_is_as_near_to_float64_as_eager(backend, dtype, generator):
    q, k, v, d_out, *tangents = inputs((2, 40, 24, 8, 12), generator, dtype)
    q *= 8**-0.5

    def second(function, tensors, d_out, tangents):
        leaves = [t.detach().requires_grad_() for t in tensors]
        first = torch.autograd.grad(function(*leaves), leaves, d_out, create_graph=True)
        return [*torch.autograd.grad(first, leaves, tangents), jvp(function, tuple(tensors), tuple(tangents))[1]]

    found = second(on(backend, 1.0), (q, k, v), d_out, tangents)
    eager = second(reference.attention, (q, k, v), d_out, tangents)
    exact = [t.double() for t in (q, k, v)], d_out.double(), [t.double() for t in tangents]
    truth = second(reference.attention, *exact)
    for one, other, right in zip(found, eager, truth, strict=True):
        assert one.dtype == dtype
        assert (one.double() - right).norm() <= 2 * (other.double() - right).norm() + 1e-3 * right.norm()


@pytest.mark.parametrize("backend", ["sdpa", "cpu", pytest.param("triton", marks=needs_interpreter)])
def test_no_map_is_kept_or_made_for_a_second_derivative(backend, generator, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_SCORES", 64)
    N = M = 128
    leaves = [t.requires_grad_() for t in inputs((1, N, M, 4, 4), generator, torch.float32)[:3]]
    sizes = []
    note = lambda t: sizes.append(t.untyped_storage().nbytes()) or t  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        first = torch.autograd.grad(on(backend)(*leaves).square().sum(), leaves, create_graph=True)
        sum(g.square().sum() for g in first).backward()
    assert sizes and max(sizes) < N * M * 4 / 8


@needs_interpreter
def test_ten_r1_steps_agree_between_backends():
    """A penalty on the gradient, as R1 has it, through a small block: eager, the CPU and Triton within rounding."""

    def train(backend):
        generator = torch.Generator().manual_seed(5)
        torch.manual_seed(5)
        block = SelfAttention2d(8, backend=backend).double()
        block.gamma.data.fill_(0.5)
        optimizer = torch.optim.SGD(block.parameters(), lr=0.05)
        for _ in range(10):
            x = randn(1, 8, 4, 6, generator=generator).requires_grad_()
            score = block(x).tanh().sum()
            (d_x,) = torch.autograd.grad(score, x, create_graph=True)
            optimizer.zero_grad()
            (score / 100 + d_x.square().sum() / 200).backward()
            optimizer.step()
        return torch.cat([p.detach().flatten() for p in block.parameters()])

    truth = train("eager")
    for backend in ("sdpa", "triton"):
        torch.testing.assert_close(train(backend), truth, rtol=1e-9, atol=1e-9)
