"""The notebook of examples/ was executed as it stands, and what is quick in it runs."""

import json
from pathlib import Path

import pytest
import torch

import sagan_fast

NOTEBOOK = json.loads((Path(__file__).parents[1] / "examples" / "first_run.ipynb").read_text())
CELLS = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def code_of(cell):
    return "".join(cell["source"])


def test_every_cell_was_executed_in_order_without_an_error():
    assert [cell["execution_count"] for cell in CELLS] == list(range(1, len(CELLS) + 1))
    kinds = [output["output_type"] for cell in CELLS for output in cell["outputs"]]
    assert "error" not in kinds
    assert sum("image/png" in output.get("data", {}) for cell in CELLS for output in cell["outputs"]) == 3


@pytest.fixture
def names(monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
    found = {}
    exec(code_of(CELLS[0]), found)
    return found


def test_its_options_are_those_of_a_run(names, monkeypatch):
    monkeypatch.setattr(sagan_fast, "train", lambda config: config)
    exec(code_of(CELLS[1]), names)
    said = "".join(output["text"] for output in CELLS[1]["outputs"] if output["output_type"] == "stream")
    assert f"done at step {names['state'].steps}" in said


def test_samples_attention_and_its_own_model_run(names, monkeypatch, capsys):
    def small(path):
        made = sagan_fast.Generator.from_preset("demo-32", base_channels=2).eval()
        made.class_names = list("abcdefghij")
        return made

    names["load_generator"] = small
    for cell in CELLS[3:]:
        exec(code_of(cell), names)
    assert names["row"].dtype == torch.uint8 and "1 weight  spectral norm" in capsys.readouterr().out
