from dataclasses import asdict

import matplotlib.image
import pytest

from benchmarks.bench_attention import CPU_SHAPES, swept
from benchmarks.figures import available, draw
from benchmarks.harness import Target
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
    for what, product in (("copy 512 MiB", "fp32"), ("product 2048", dtype), ("2**20 exponentials", "fp32")):
        made.append(Record("ceilings", what, product, "forward", "torch", method, p50_us=1e5))
    return [asdict(r) for r in made]


@pytest.mark.parametrize("prefix", ["cpu", "gpu"], ids=["processor", "graphics"])
def test_figures_are_drawn_from_records_and_removed_without(prefix, tmp_path):
    if prefix == "cpu":
        given = records((*CPU_SHAPES, *swept(Target("cpu"))), ("eager", "sdpa", "auto"), "fp32", "wall")
    else:
        shapes = (*BLOCK_SHAPES, *swept(Target("cuda")))
        given = records(shapes, ("eager", "sdpa", "flex", "triton"), "bf16", "graph")
    made = draw(given, tmp_path, prefix, "a device")
    assert [p.name for p in made] == [f"{prefix}-{name}.png" for name in ("peers", "roofline", "size", "batch")]
    for path in made:
        assert (matplotlib.image.imread(path)[..., :3].min(-1) < 0.8).mean() > 0.005
    again = draw(given, tmp_path / "again", prefix, "a device")
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(again, made, strict=True))
    assert draw([], tmp_path, prefix, "a device") == [] and not any(path.exists() for path in made)


def test_a_shape_without_ours_and_one_without_a_limit(tmp_path):
    given = records([BLOCK_SHAPES[0]], ("eager",), "fp32", "wall")
    assert draw(given, tmp_path, "cpu", "a device") == [] == list(available(given, "cpu"))
    given = [{**r, "bound_us": None} for r in records([BLOCK_SHAPES[0]], ("eager", "auto"), "fp32", "wall")]
    assert list(available(given, "cpu")) == ["peers"]
