import pytest
import torch

from benchmarks.shapes import SAGAN_MATRICES
from sagan_fast.kernels.spectral_norm import reference
from sagan_fast.kernels.spectral_norm.tables import MAX_COLUMNS, MAX_ROWS
from sagan_fast.ops.spectral_norm import _backward_op, _forward_op, batches, spectral_norm_group
from shared_by_tests import assert_close_to_truth, randn, spectral_norm_inputs, spectral_norm_truth

SHAPES = [(64, 3, 3, 3), (3, 64, 3, 3), (1, 1024), (16, 128, 1, 1), (130, 77)]
backends = pytest.mark.parametrize("backend", ["eager", "triton"])


def check(generator, shapes, backend, update=True, n_power_iterations=1):
    weights, us, vs = spectral_norm_inputs(shapes, generator)
    truths = [spectral_norm_truth(*one, n_power_iterations, update) for one in zip(weights, us, vs, strict=True)]
    weights = [w.requires_grad_() for w in weights]
    grads = [randn(*w.shape, generator=generator, dtype=torch.float32) for w in weights]
    outs = spectral_norm_group(weights, us, vs, n_power_iterations=n_power_iterations, update=update, backend=backend)
    d_weights = torch.autograd.grad(outs, weights, grads)
    for out, u, v, d_weight, weight, grad, (out_truth, sigma, u_truth, v_truth) in zip(
        outs, us, vs, d_weights, weights, grads, truths, strict=True
    ):
        matrix = weight.detach().double().flatten(1)
        d_truth = reference.normalise_backward(grad.double().flatten(1), matrix, u_truth, v_truth, sigma)
        assert_close_to_truth("W/sigma", out, out_truth)
        assert_close_to_truth("u", u, u_truth)
        assert_close_to_truth("v", v, v_truth)
        if weight.numel() > weight.shape[0] > 1:  # a single row has no gradient but rounding
            assert_close_to_truth("dW", d_weight.flatten(1), d_truth)


@backends
@pytest.mark.parametrize(("update", "n_power_iterations"), [(True, 1), (True, 2), (False, 1)])
def test_matches_float64(generator, backend, update, n_power_iterations):
    check(generator, SHAPES, backend, update, n_power_iterations)


def test_all_sagan_matrices_eager(generator):
    check(generator, SAGAN_MATRICES[9:40:2], "eager")


@pytest.mark.slow
@backends
def test_all_sagan_matrices(generator, backend):
    check(generator, SAGAN_MATRICES, backend)


@backends
def test_two_calls_then_one_backward_and_two_backwards(generator, backend):
    """The second call moves u and v in place; the first one's gradient still uses its own."""
    weights, us, vs = spectral_norm_inputs([(16, 27), (8, 12)], generator)
    weights = [w.requires_grad_() for w in weights]
    grads = [randn(*w.shape, generator=generator, dtype=torch.float32) for w in weights]
    alone = []
    copies = [u.clone() for u in us], [v.clone() for v in vs]
    for _ in range(2):
        alone.append(torch.autograd.grad(spectral_norm_group(weights, *copies, backend="eager"), weights, grads))
    first = spectral_norm_group(weights, us, vs, backend=backend)
    second = spectral_norm_group(weights, us, vs, backend=backend)
    together = torch.autograd.grad([*first, *second], weights, grads * 2, retain_graph=True)
    apart = [torch.autograd.grad(outs, weights, grads) for outs in (first, second)]
    for i in range(len(weights)):
        assert_close_to_truth("one backward", together[i], alone[0][i].double() + alone[1][i].double())
        for one, other in zip(apart, alone, strict=True):
            assert_close_to_truth("own backward", one[i], other[i].double())


@backends
def test_some_weights_without_gradient_and_some_results_unused(generator, backend):
    weights, us, vs = spectral_norm_inputs([(16, 27), (8, 12), (5, 6)], generator)
    weights[1].requires_grad_()
    weights[2].requires_grad_()
    outs = spectral_norm_group(weights, us, vs, backend=backend)
    outs[1].square().sum().backward()
    assert weights[0].grad is None and weights[2].grad is None
    assert weights[1].grad is not None and weights[1].grad.isfinite().all()


def test_gradcheck_and_gradgradcheck(generator):
    weights = [randn(4, 3, 2, 2, generator=generator), randn(3, 5, generator=generator)]
    weights = [w.requires_grad_() for w in weights]
    us = [torch.nn.functional.normalize(randn(w.shape[0], generator=generator), dim=0) for w in weights]
    vs = [torch.nn.functional.normalize(randn(w[0].numel(), generator=generator), dim=0) for w in weights]

    def normalised(*weights):
        return tuple(spectral_norm_group(weights, us, vs, update=False))

    assert torch.autograd.gradcheck(normalised, weights)
    assert torch.autograd.gradgradcheck(normalised, weights)


def test_double_backward_of_the_kernels_matches_that_of_plain_pytorch(generator):
    weights, us, vs = spectral_norm_inputs([(16, 27), (8, 3, 3, 3)], generator)
    weights[1] = weights[1].contiguous(memory_format=torch.channels_last)
    x = [randn(*w.shape, generator=generator, dtype=torch.float32) for w in weights]
    found = {}
    for backend in ("triton", "eager"):
        leaves = [w.clone().requires_grad_() for w in weights]
        outs = spectral_norm_group(leaves, us, vs, update=False, backend=backend)
        loss = sum((out * x_i).sum().square() for out, x_i in zip(outs, x, strict=True))
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        found[backend] = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
    for triton, eager in zip(found["triton"], found["eager"], strict=True):
        assert_close_to_truth("double backward", triton, eager.double())


@backends
def test_half_precision_weights_and_vectors(generator, backend):
    weights, us, vs = spectral_norm_inputs(SHAPES, generator, torch.float16)
    us, vs = [u.half() for u in us], [v.half() for v in vs]
    truths = [spectral_norm_truth(*one) for one in zip(weights, us, vs, strict=True)]
    for out, u, (out_truth, _, u_truth, _) in zip(
        spectral_norm_group(weights, us, vs, backend=backend), us, truths, strict=True
    ):
        assert out.dtype == torch.float16 and u.dtype == torch.float16
        assert_close_to_truth("W/sigma", out, out_truth)
        assert_close_to_truth("u", u, u_truth)


def test_dtypes_mixed_and_other_dtype_out(generator):
    weights, us, vs = spectral_norm_inputs(SHAPES, generator)
    weights[1], weights[3] = weights[1].bfloat16(), weights[3].double()
    truths = [spectral_norm_truth(*one) for one in zip(weights, us, vs, strict=True)]
    outs = spectral_norm_group(weights, us, vs, update=True, out_dtype=torch.bfloat16)
    for out, (truth, *_) in zip(outs, truths, strict=True):
        assert out.dtype == torch.bfloat16
        assert_close_to_truth("W/sigma", out, truth)


def test_weights_of_any_strides(generator):
    (weight,), us, vs = spectral_norm_inputs([(9, 12)], generator)
    strided = weight.t().contiguous().t().requires_grad_()
    truth, *_ = spectral_norm_truth(weight, us[0], vs[0])
    (out,) = spectral_norm_group([strided], us, vs)
    assert_close_to_truth("W/sigma", out, truth)
    out.sum().backward()
    assert strided.grad is not None and strided.grad.shape == (9, 12)


def test_computed_in_float32_under_autocast(generator):
    weights, us, vs = spectral_norm_inputs([(64, 300)], generator)
    truth, *_ = spectral_norm_truth(weights[0], us[0], vs[0])
    weight = weights[0].requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (out,) = spectral_norm_group([weight], us, vs)
        (d_weight,) = torch.autograd.grad(out.square().sum(), weight, create_graph=True)
        d_weight.square().sum().backward()
    assert out.dtype == torch.float32
    assert_close_to_truth("W/sigma", out, truth)


@backends
def test_opcheck(generator, backend):
    weights, us, vs = spectral_norm_inputs([(16, 27), (8, 3, 3, 3)], generator)
    # What lies between the matrices in the flat results is left as it was, and differs from run to run.
    utils = ("test_schema", "test_faketensor")
    torch.library.opcheck(_forward_op, (weights, us, vs, 1, 1e-12, True, torch.float32, backend), test_utils=utils)
    _, sigmas, u, v = _forward_op(weights, us, vs, 1, 1e-12, False, torch.float32, backend)
    grads = [randn(*weights[0].shape, generator=generator, dtype=torch.float32), None]
    torch.library.opcheck(_backward_op, (grads, weights, sigmas, u, v, backend), test_utils=utils)


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_compiles_without_graph_breaks(generator, backend):
    weights, us, vs = spectral_norm_inputs([(16, 27), (8, 3, 3, 3)], generator)
    weights = [w.requires_grad_() for w in weights]
    copies = [u.clone() for u in us], [v.clone() for v in vs]

    def loss(weights, us, vs):
        return sum(out.sin().sum() for out in spectral_norm_group(weights, us, vs, backend=backend))

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        ours = torch.autograd.grad(compiled(weights, us, vs), weights)
        theirs = torch.autograd.grad(loss(weights, *copies), weights)
        for a, b in zip([*ours, *us, *vs], [*theirs, *copies[0], *copies[1]], strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"backend": "cuda"}, ValueError, "backend must be one of"),
        ({"us": []}, ValueError, "us and vs must have the length"),
        ({"n_power_iterations": 0}, ValueError, "n_power_iterations must be at least 1"),
        ({"weights": [torch.ones(4, 6, dtype=torch.int64)]}, TypeError, "floating-point"),
        ({"weights": [torch.ones(24)]}, ValueError, "must have rows and columns"),
        ({"vs": [torch.ones(5)]}, ValueError, r"shapes \(R,\) and \(K,\)"),
    ],
)
def test_refuses_what_it_cannot_take(change, error, match):
    arguments = {"weights": [torch.ones(4, 6)], "us": [torch.ones(4)], "vs": [torch.ones(6)]} | change
    with pytest.raises(error, match=match):
        spectral_norm_group(**arguments)


@pytest.mark.slow
def test_a_matrix_of_many_rows_is_taken_by_the_kernels(generator):
    """The first layer of BigGAN-128 at 96 channels has 24,576 rows."""
    check(generator, [(24576, 20), (16, 40)], "triton")


def test_a_matrix_too_large_for_the_kernels_does_not_keep_the_others_from_them(generator):
    weights = [torch.empty(4, 4, device="meta") for _ in range(4)]
    weights[1] = torch.empty(8, MAX_COLUMNS + 1, device="meta")
    weights[2] = torch.empty(MAX_ROWS + 1, 8, device="meta")
    assert batches(weights) == [[0, 3], [1, 2]]


def test_nothing_to_do():
    assert spectral_norm_group([], [], []) == []


@pytest.mark.gpu
def test_all_sagan_matrices_on_gpu(generator):
    weights, us, vs = ([x.cuda() for x in xs] for xs in spectral_norm_inputs(SAGAN_MATRICES, generator))
    truths = [spectral_norm_truth(*one) for one in zip(weights, us, vs, strict=True)]
    with torch.autocast("cuda", dtype=torch.bfloat16):
        outs = spectral_norm_group(weights, us, vs, out_dtype=torch.bfloat16)
    for out, (truth, *_) in zip(outs, truths, strict=True):
        assert_close_to_truth("W/sigma", out, truth)
