from dataclasses import asdict, replace

import matplotlib.image
import pytest

from benchmarks.bench_attention import CPU_SHAPES, sweep
from benchmarks.figures import draw
from benchmarks.records import Record
from benchmarks.shapes import BLOCK_SHAPES


def records(shapes, providers, dtype, method):
    made = []
    for shape in shapes:
        for mode in ("forward", "forward+backward"):
            for i, provider in enumerate(providers):
                time = shape.flops(mode != "forward") / 1e6 * (len(providers) - i)
                numbers = {"p50_us": time, "saved_bytes": shape.N * 64, "bound_us": time / 3}
                made.append(
                    Record("attention", shape.name, dtype, mode, provider, method, config=vars(shape), **numbers)
                )
    return [asdict(r) for r in made]


@pytest.mark.parametrize("prefix", ["cpu", "gpu"], ids=["processor", "graphics"])
def test_figures_are_drawn_from_records_and_empty_without(prefix, tmp_path):
    if prefix == "cpu":
        given = records((*CPU_SHAPES, *sweep("cpu")), ("eager", "sdpa", "auto"), "fp32", "wall")
    else:
        shapes = (*BLOCK_SHAPES, *sweep("cuda"))
        given = records(shapes, ("eager", "sdpa", "flex", "triton"), "bf16", "graph")
    names = [f"{prefix}-{name}.png" for name in ("peers", "roofline", "size", "batch")]
    full, empty = (draw(r, tmp_path / kind, prefix, "a device") for kind, r in (("full", given), ("empty", [])))
    assert [p.name for p in full] == names == [p.name for p in empty]
    for path, without in zip(full, empty, strict=True):
        ink, none = ((matplotlib.image.imread(p)[..., :3].min(-1) < 0.8).mean() for p in (path, without))
        assert ink > 2 * none > 0
    again = draw(given, tmp_path / "again", prefix, "a device")
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(again, full, strict=True))


def test_one_shape_without_ours_is_not_measured(tmp_path):
    shape = replace(BLOCK_SHAPES[0])
    for path in draw(records([shape], ("eager",), "fp32", "wall"), tmp_path, "cpu", "a device"):
        assert (matplotlib.image.imread(path)[..., :3].min(-1) < 0.8).mean() < 0.02
