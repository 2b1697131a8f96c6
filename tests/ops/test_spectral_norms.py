"""Spectral norms of an optimizer's updates: mixed lists, other tensors at every step, scaling, capture, compilation."""

import pytest
import torch
import torch.nn.functional as F

from sagan_fast.functional import scale_spectral_norms_, spectral_norms
from sagan_fast.kernels.spectral_norm import addresses, reference, stacks, tables
from sagan_fast.ops import spectral_norms as op
from shared_by_tests import assert_close_to_truth, on_a_real_gpu, randn

backends = pytest.mark.parametrize("backend", ["eager", "triton"])
SHAPES = [(16, 27), (3, 5, 12), (8, 3, 3, 3), (7, 20)]
STACKS = [False, True, False, False]


def vectors(generator, shapes=SHAPES, are_stacks=STACKS):
    us, vs = [], []
    for shape, is_stack in zip(shapes, are_stacks, strict=True):
        leading, (R, *rest) = (shape[:1], shape[1:]) if is_stack else ((), shape)
        sizes = (*leading, R), (*leading, int(torch.tensor(rest).prod()))
        u, v = (F.normalize(torch.randn(size, generator=generator), dim=-1) for size in sizes)
        us.append(u), vs.append(v)
    return us, vs


def updates(generator, dtypes=(torch.float32,) * 4, shapes=SHAPES):
    return [randn(*shape, generator=generator, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]


def truth(x, u, v):
    """Return sigma, u, v and X/sigma of a matrix or a stack, each in float64."""
    if u.ndim == 1:
        sigma, u, v = reference.norm_of_update(x.double().flatten(1), u.double(), v.double())
        return sigma, u, v, x.double() / (sigma if sigma >= 1e-6 else 1.0)
    return tuple(map(torch.stack, zip(*map(truth, x, u, v), strict=True)))


@backends
def test_a_mixed_list_matches_float64_and_is_scaled_in_one_go(generator, backend):
    tensors = updates(generator, (torch.float32, torch.bfloat16, torch.bfloat16, torch.float32))
    tensors[1][2] = 0
    us, vs = vectors(generator)
    us[0], vs[0] = us[0].bfloat16(), vs[0].bfloat16()
    truths = [truth(*one) for one in zip(tensors, us, vs, strict=True)]
    sigmas = spectral_norms(tensors, us, vs, backend=backend)
    assert [tuple(sigma.shape) for sigma in sigmas] == [(), (3,), (), ()] and sigmas[1][2] == 0
    assert {sigma.dtype for sigma in sigmas} == {torch.float32}
    places = [x.data_ptr() for x in tensors]
    scale_spectral_norms_(tensors, sigmas, [0.5, 2.0, 1.0, 3.0], backend=backend)
    assert [x.data_ptr() for x in tensors] == places
    for i, target in enumerate((0.5, 2.0, 1.0, 3.0)):
        sigma, u, v, scaled = truths[i]
        scaled = scaled if i != 1 else torch.cat([scaled[:2], scaled[2:] / target])  # of zeros
        for name, found, exact in zip(
            "suvx", (sigmas[i], us[i], vs[i], tensors[i]), (sigma, u, v, scaled * target), strict=True
        ):
            assert_close_to_truth(f"{name} of tensor {i}", found, exact)


@backends
def test_one_iteration_a_step_follows_updates_at_ever_new_addresses(generator, backend):
    us, vs = vectors(generator)
    base = updates(generator)
    kept = []
    for _ in range(40 if backend == "eager" else 3):
        tensors = [x + 1e-4 * torch.randn(x.shape, generator=generator) for x in base]
        kept.append(tensors)  # or the next would lie at the same places
        before = [(u.clone(), v.clone()) for u, v in zip(us, vs, strict=True)]
        sigmas = spectral_norms(tensors, us, vs, backend=backend)
        for x, (u, v), sigma in zip(tensors, before, sigmas, strict=True):
            assert_close_to_truth("sigma", sigma, truth(x, u, v)[0])
    if backend == "eager":
        largest = torch.linalg.matrix_norm(tensors[0].double(), 2)
        assert 0.9 < sigmas[0] / largest < 1 + 1e-6


@backends
def test_tensors_of_any_strides_and_targets_of_each_kind(generator, backend):
    x, stack = torch.randn(12, 9, generator=generator).t(), torch.randn(6, 4, 5, generator=generator)[::2]
    us, vs = vectors(generator, [(9, 12), (3, 4, 5)], [False, True])
    truths = [truth(*one)[3] for one in zip((x, stack), us, vs, strict=True)]
    sigmas = spectral_norms([x, stack], us, vs, backend=backend)
    for targets in (2.0, [2.0, 2.0], torch.tensor(2.0), torch.tensor([2.0, 2.0])):
        tensors = [x.clone().t().contiguous().t(), torch.randn(6, 4, 5)[::2].copy_(stack)]
        scale_spectral_norms_(tensors, sigmas, targets, backend=backend)
        for found, exact in zip(tensors, truths, strict=True):
            assert_close_to_truth("scaled", found, 2 * exact)


@backends
def test_no_gradient_and_writes_are_noticed(generator, backend):
    x, (us, vs) = torch.randn(5, 6, generator=generator).requires_grad_(), vectors(generator, [(5, 6)], [False])
    versions = us[0]._version, vs[0]._version
    (sigma,) = spectral_norms([x], us, vs, backend=backend)
    assert not sigma.requires_grad and us[0]._version > versions[0] and vs[0]._version > versions[1]
    y = x.detach().clone()
    version = y._version
    scale_spectral_norms_([y], [sigma], backend=backend)
    assert y._version > version and spectral_norms([], [], []) == []


def capture(monkeypatch):
    for module in (addresses, tables, stacks, op):
        monkeypatch.setattr(module, "is_capturing", lambda device: True)


def test_a_capture_takes_new_addresses_but_no_new_shapes(generator, monkeypatch):
    us, vs = vectors(generator)
    first, second = updates(generator), updates(generator)
    scale_spectral_norms_(first, spectral_norms(first, us, vs, backend="triton"), 1.0, backend="triton")
    truths = [truth(*one) for one in zip(second, us, vs, strict=True)]
    capture(monkeypatch)
    sigmas = spectral_norms(second, us, vs, backend="triton")
    scale_spectral_norms_(second, sigmas, torch.tensor(1.0), backend="triton")
    for x, sigma, (exact, _, _, scaled) in zip(second, sigmas, truths, strict=True):
        assert_close_to_truth("sigma", sigma, exact)
        assert_close_to_truth("scaled", x, scaled)
    with pytest.raises(RuntimeError, match="one number or a tensor while a CUDA graph is captured"):
        scale_spectral_norms_(second, sigmas, [1.0] * 4, backend="triton")
    with pytest.raises(RuntimeError, match="captured after one run outside"):
        spectral_norms([torch.ones(3, 4, 11)], [torch.ones(3, 4)], [torch.ones(3, 11)], backend="triton")


def test_compiles_without_graph_breaks(generator, backend="triton"):
    us, vs = vectors(generator)
    copies = [u.clone() for u in us], [v.clone() for v in vs]

    def step(tensors, us, vs, targets):
        sigmas = spectral_norms(tensors, us, vs, backend=backend)
        scale_spectral_norms_(tensors, sigmas, targets, backend=backend)
        return sigmas

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    tensors = updates(generator)
    others = [x.clone() for x in tensors]
    ours = compiled(tensors, us, vs, torch.tensor(2.0))
    theirs = step(others, *copies, torch.tensor(2.0))
    for a, b in zip([*ours, *tensors, *us, *vs], [*theirs, *others, *copies[0], *copies[1]], strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"backend": "cuda"}, ValueError, "backend must be one of"),
        ({"us": []}, ValueError, "us and vs must have the length of tensors, 1, got 0 and 1"),
        ({"n_power_iterations": 0}, ValueError, "n_power_iterations must be at least 1"),
        ({"tensors": [torch.ones(4, 6, dtype=torch.int64)]}, TypeError, "floating-point"),
        ({"tensors": [torch.ones(24)]}, ValueError, "must have rows and columns"),
        ({"vs": [torch.ones(5)]}, ValueError, r"shapes \(R,\) and \(K,\) = \(4,\) and \(6,\)"),
        ({"us": [torch.ones(4, 6)], "tensors": [torch.ones(4, 6, 2)]}, ValueError, r"\(E, R\) and \(E, K\)"),
        ({"us": [torch.ones(4, 6)]}, ValueError, "must have matrices with rows and columns"),
    ],
)
def test_refuses_what_it_cannot_take(change, error, match):
    arguments = {"tensors": [torch.ones(4, 6)], "us": [torch.ones(4)], "vs": [torch.ones(6)]} | change
    with pytest.raises(error, match=match):
        spectral_norms(**arguments)


@pytest.mark.parametrize(
    ("sigmas", "targets", "match"),
    [
        ([], 1.0, "sigmas must have the length of tensors, 1, got 0"),
        ([torch.ones(2)], 1.0, r"sigmas\[0\] must have shape \(\) for a matrix or \(E,\) = \(4,\)"),
        ([torch.ones(())], [1.0, 2.0], "targets must be one number or one a tensor, 1, got 2"),
    ],
)
def test_refuses_what_it_cannot_scale(sigmas, targets, match):
    with pytest.raises(ValueError, match=match):
        scale_spectral_norms_([torch.ones(4, 3, 2)], sigmas, targets)


@on_a_real_gpu
@pytest.mark.gpu
def test_a_captured_step_is_replayed_on_new_updates(generator):
    us, vs = ([x.cuda() for x in some] for some in vectors(generator))
    tensors = [x.cuda() for x in updates(generator)]
    target = torch.ones((), device="cuda")

    def step():
        copies = [x.clone() for x in tensors]  # at addresses of the graph's own
        sigmas = spectral_norms(copies, us, vs)
        scale_spectral_norms_(copies, sigmas, target)
        return sigmas, copies

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sigmas, copies = step()
    for value in (1.0, 2.0, 3.0):
        for x, new in zip(tensors, updates(generator), strict=True):
            x.copy_(new)
        target.fill_(value)
        truths = [truth(x.cpu(), u.cpu(), v.cpu()) for x, u, v in zip(tensors, us, vs, strict=True)]
        graph.replay()
        for sigma, scaled, (exact, _, _, unit) in zip(sigmas, copies, truths, strict=True):
            assert_close_to_truth("sigma", sigma, exact)
            assert_close_to_truth("scaled", scaled, unit * value)
