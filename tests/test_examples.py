"""The scripts of examples/ run as they stand and do what they promise."""

import importlib.util
import runpy
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "examples"
PRINTED = {
    "accelerate_biggan.py": ["pooled, with an output projection", "6 weights", "loss after 3 steps: ", "undone: True"],
    "accelerate_sagan.py": ["unpooled, its map on demand", "2 weights", "map of (4, 256, 256)", "sums to 1.000"],
    "functional.py": ["attention: (2, 1024, 64)", "block: (2, 64, 32, 32)", "singular values: 1.00 and 1.00"],
}
PATH = FOLDER / "spectral_descent.py"


def example():
    spec = importlib.util.spec_from_file_location("spectral_descent", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def matrix_step(p, grad, state, lr, momentum):
    """Update one matrix as the example does, in float32, with plain products; return it."""
    state["momentum"] = momentum * state["momentum"] + (1 - momentum) * grad
    x = state["momentum"]
    z = x @ state["v"]
    if z.norm() < 1e-6:
        return p - lr * x
    state["u"] = z / z.norm()
    t = x.t() @ state["u"]
    state["v"] = t / t.norm()
    return p - lr * (x.shape[0] / x.shape[1]) ** 0.5 * x / t.norm()


def test_steps_equal_the_loop_over_matrices(generator):
    shapes = {"matrix": (12, 20), "conv": (6, 4, 3, 3), "stack": (3, 8, 10), "idle": (5, 7)}
    params = {name: torch.nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}
    stack = params.pop("stack")
    groups = [{"params": list(params.values())}, {"params": [stack], "stacks": True}]
    optimizer = example().SpectralDescent(groups, lr=0.1, momentum=0.9)
    all_params = [*params.values(), stack]

    def slices(x):  # of all parameters, matrix by matrix
        return [each.flatten(1) for tensor in x for each in (tensor if tensor.ndim == 3 else (tensor,))]

    expected, states = [p.detach().clone() for p in slices(all_params)], []
    for step in range(5):
        grads = [torch.randn(p.shape, generator=generator) for p in all_params]
        grads[2].zero_()  # a weight that nothing reaches
        grads[3][1] = 0  # and an expert
        for p, grad in zip(all_params, grads, strict=True):
            p.grad = grad
        if step == 0:
            drawn = [optimizer._vectors(p, p is stack) for p in all_params]
            for x, p in zip(drawn, all_params, strict=True):
                pairs = zip(*x, strict=True) if p is stack else [x]
                matrices = p if p is stack else [p]
                for (u, v), matrix in zip(pairs, matrices, strict=True):
                    zeros = torch.zeros_like(matrix.flatten(1))
                    states.append({"u": u.clone(), "v": v.clone(), "momentum": zeros})
        optimizer.step()
        given = zip(expected, slices(grads), states, strict=True)
        expected = [matrix_step(p, grad, state, 0.1, 0.9) for p, grad, state in given]
        for found, one in zip(slices(all_params), expected, strict=True):
            assert (found - one).norm() <= 1e-6 * one.norm()


def test_updates_have_the_norm_asked_for_and_the_network_learns(capsys):
    module = example()
    weight = torch.nn.Parameter(torch.zeros(30, 10))
    optimizer = module.SpectralDescent([weight], lr=0.5, momentum=0.0)
    gradient = torch.randn(30, 10)
    for _ in range(40):
        before = weight.detach().clone()
        weight.grad = gradient
        optimizer.step()
    norm = torch.linalg.matrix_norm(weight.detach() - before, 2)
    torch.testing.assert_close(norm, torch.tensor(0.5 * 3**0.5), rtol=0.02, atol=0.0)
    losses = module.main(60)
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10]) and "step 59  loss" in capsys.readouterr().out


@pytest.mark.parametrize("name", PRINTED)
def test_the_script_prints_what_it_promises(name, capsys):
    runpy.run_path(str(FOLDER / name))
    out = capsys.readouterr().out
    assert all(part in out for part in PRINTED[name]), out
