import pytest

from benchmarks.bench_resized_conv import main, measure


@pytest.mark.parametrize("direction", ["up", "down"])
def test_all_forms_compute_the_same(direction):
    found = measure(direction, (3, 5, 8), 2, 1)
    assert set(found) == {"plain", "folded", "rearranged"}
    assert all(len(parts) == 3 and min(parts) >= 0 for parts in found.values())


@pytest.mark.slow
def test_every_shape_has_its_rows(capsys):
    assert main(["--batch", "1", "--rounds", "1", "--narrower", "16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 30 and lines[0].split()[0] == "resizing"
