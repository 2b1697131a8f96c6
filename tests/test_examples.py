"""The scripts of examples/ run as they stand and print what they promise."""

import runpy
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "examples"
PRINTED = {
    "accelerate_biggan.py": ["pooled, with an output projection", "6 weights", "loss after 3 steps: ", "undone: True"],
    "accelerate_sagan.py": ["unpooled, its map on demand", "2 weights", "map of (4, 256, 256)", "sums to 1.000"],
    "functional.py": ["attention: (2, 1024, 64)", "block: (2, 64, 32, 32)", "singular values: 1.00 and 1.00"],
}


@pytest.mark.parametrize("name", sorted(path.name for path in FOLDER.glob("*.py")))
def test_the_script_prints_what_it_promises(name, capsys):
    runpy.run_path(str(FOLDER / name))
    out = capsys.readouterr().out
    assert all(part in out for part in PRINTED[name]), out
