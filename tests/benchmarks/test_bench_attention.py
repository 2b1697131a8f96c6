from dataclasses import replace

import pytest

from benchmarks.bench_attention import CPU_SHAPES, case, gradient, inputs, runner, sweep
from benchmarks.harness import Effort, measure
from benchmarks.shapes import BLOCK_SHAPES
from sagan_fast.functional import self_attention_2d


@pytest.mark.parametrize("shape", [BLOCK_SHAPES[0], BLOCK_SHAPES[6]], ids=lambda s: s.name)
@pytest.mark.parametrize("mode", ["forward", "forward+backward"])
def test_providers_pass_the_gate_and_ours_keeps_less(shape, mode):
    records = measure(case(replace(shape, B=2, H=16, W=16), "fp32", mode, "cpu"), "cpu", Effort(rounds=1))
    assert [r.provider for r in records] == ["eager", "sdpa", "auto"]
    assert all(r.error == "" for r in records)


@pytest.mark.parametrize("backend", ["eager", "auto"])
@pytest.mark.parametrize("mode", ["forward", "forward+backward"])
@pytest.mark.parametrize("side", [16, pytest.param(64, marks=pytest.mark.slow)], ids=["N256", "N4096"])
@pytest.mark.benchmark(group="attention block, unpooled")
def test_block_on_the_cpu(benchmark, side, mode, backend):
    """`--benchmark-enable` times it, `-m slow` at N = 4096; without it runs once."""
    shape = replace(CPU_SHAPES[0], B=2, H=side, W=side)

    def block(x, w_theta, w_phi, w_g, w_o, gamma):
        return self_attention_2d(x, w_theta, w_phi, w_g, w_o, gamma, pool=False, backend=backend)

    d_ys = [gradient(shape, "fp32", "cpu")] if mode != "forward" else []
    results = benchmark(runner(block, [inputs(shape, "fp32", "cpu", 0)], d_ys), 0)
    assert all(t.isfinite().all() for t in results) and len(results) == (6 if d_ys else 1)


def test_inputs_of_a_gpu_case_do_not_fit_its_cache():
    for shape in (*BLOCK_SHAPES, *sweep("cuda")):
        sets = case(shape, "bf16", "forward", "cuda").num_sets
        assert sets * shape.B * shape.C * shape.N * 2 >= 60 << 20, shape.name


def test_the_sweep_covers_small_and_large():
    shapes = sweep("cuda") + sweep("cpu")
    assert {s.N for s in shapes} >= {256, 1024, 4096, 16384} and {s.B for s in shapes} >= {1, 4, 16, 256}
    assert len({s.name for s in (*shapes, *BLOCK_SHAPES, *CPU_SHAPES)}) == len(shapes) + len(BLOCK_SHAPES) + len(
        CPU_SHAPES
    )
