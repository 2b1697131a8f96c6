"""The grouped pass against torch's loop over the layers, on the CPU.

`pytest tests/benchmarks/test_bench_spectral_norm.py --benchmark-enable` times them (`-m slow` all 44 matrices); without
it they run once, as tests that both do the same.
"""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from benchmarks.accuracy import rel_rms
from benchmarks.bench_spectral_norm import SMALL as SMALL_MATRICES
from benchmarks.bench_spectral_norm import cases
from benchmarks.harness import Target, measure
from benchmarks.shapes import SAGAN_MATRICES
from sagan_fast.layers.spectral_norm import fuse_spectral_norm

SMALL = [(R, K) for R, K in SAGAN_MATRICES if R * K <= 2**18]
lists = pytest.mark.parametrize(
    "matrices",
    [pytest.param(SMALL, id="up to 2**18 elements"), pytest.param(SAGAN_MATRICES, id="all 44", marks=pytest.mark.slow)],
)


def model_of(matrices):
    model = nn.ModuleList(nn.Linear(K, R, bias=False) for R, K in matrices)
    for layer in model:
        parametrizations.spectral_norm(layer)
    return model


def run_torch(model):
    with torch.no_grad():
        return [layer.weight for layer in model]


@lists
@pytest.mark.benchmark(group="spectral norm, one update and W/sigma")
def test_torch_loop(benchmark, matrices):
    model = model_of(matrices)
    outs = benchmark(run_torch, model)
    assert len(outs) == len(matrices)


@lists
@pytest.mark.benchmark(group="spectral norm, one update and W/sigma")
def test_group_step(benchmark, matrices):
    model = model_of(matrices)
    truth = run_torch(copy.deepcopy(model))
    group = fuse_spectral_norm(model)
    group.step()
    for ours, theirs in zip(run_torch(model), truth, strict=True):
        assert rel_rms(ours, theirs) < 1e-5
    benchmark(group.step)


@pytest.mark.parametrize("target", [Target("cpu"), Target("cpu", dry_run=True)], ids=["cpu", "dry run"])
def test_providers_compute_w_over_sigma_in_their_own_order(target, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    for case in cases(target, SMALL_MATRICES[:2]):
        records = measure(case, "cpu", rounds=1)
        assert all(r.error == "" and r.relative_rms < 3e-5 for r in records)
        compiled = {"parametrization-compiled", "biggan-compiled"} if target.dry_run else set()
        assert {r.provider for r in records} == {"parametrization", "legacy", "biggan", "function", "group"} | compiled
