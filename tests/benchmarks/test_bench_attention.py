from dataclasses import replace

import pytest

from benchmarks.bench_attention import CPU_SHAPES, case, sweep
from benchmarks.harness import Effort, measure
from benchmarks.shapes import BLOCK_SHAPES


@pytest.mark.parametrize("shape", [BLOCK_SHAPES[0], BLOCK_SHAPES[6]], ids=lambda s: s.name)
@pytest.mark.parametrize("mode", ["forward", "forward+backward"])
def test_providers_pass_the_gate_and_ours_keeps_less(shape, mode):
    records = measure(case(replace(shape, B=2, H=16, W=16), "fp32", mode, "cpu"), "cpu", Effort(rounds=1))
    assert [r.provider for r in records] == ["eager", "sdpa", "auto"]
    assert all(r.error == "" for r in records)


def test_the_sweep_covers_small_and_large():
    shapes = sweep("cuda") + sweep("cpu")
    assert {s.N for s in shapes} >= {256, 1024, 4096, 16384} and {s.B for s in shapes} >= {1, 4, 16, 256}
    assert len({s.name for s in (*shapes, *BLOCK_SHAPES, *CPU_SHAPES)}) == len(shapes) + len(BLOCK_SHAPES) + len(
        CPU_SHAPES
    )
