"""What `sagan-fast export` writes and refuses."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import sagan_fast
from sagan_fast import cli
from sagan_fast.models import export
from sagan_fast.models.checkpoint import load_generator

FILES = ["README.md", "config.json", "model.safetensors", "samples.png"]


@pytest.mark.slow
def test_every_format_gives_the_samples(tiny_run, tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    folder = tmp_path / "new" / "e"
    assert cli.main(["export", str(tiny_run), "--out", str(folder), "--format", "torchscript,safetensors,onnx"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and all("differs from the checkpoint's samples by" in line for line in lines[:-1])
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md", "config.json", "model.onnx", "model.safetensors", "model.torchscript.pt",
        "samples.png",
    ]  # fmt: skip
    generator = load_generator(tiny_run)
    inputs = export.example(generator, 3, seed=9)
    for path in (export.WEIGHTS, export.ONNX, export.TORCHSCRIPT):
        torch.testing.assert_close(export.read(folder / path)(*inputs), generator(*inputs))
    config = json.loads((folder / "config.json").read_text())
    assert config["step"] == 2 and config["weights"] == "averaged" and config["data"] == "shapes"
    assert config["class_names"][3] == "ring" and "3 ring" in (folder / "README.md").read_text()


def test_the_default_is_safetensors_and_is_read_like_a_checkpoint(tiny_run, tmp_path, sentence, capsys):
    assert cli.main(["export", str(tiny_run), "--out", str(tmp_path / "e"), "--last"]) == 0
    assert sorted(path.name for path in (tmp_path / "e").iterdir()) == FILES
    for where, more in ((tiny_run, ["--last"]), (tmp_path / "e", [])):
        out = str(tmp_path / f"{where.name}.png")
        assert cli.main(["sample", str(where), "--out", out, "--grid", "--count", "4", *more]) == 0
    a, b = (np.asarray(Image.open(tmp_path / name)).astype(int) for name in ("e.png", "run.png"))
    assert abs(a - b).max() <= 1  # on a GPU sigma is rounded otherwise
    assert sagan_fast.Generator.from_pretrained(tmp_path / "e").class_names[0] == "circle"
    assert cli.main(["sample", str(tmp_path / "e"), "--out", "x.png", "--grid", "--last"]) == 2
    assert "is an exported generator: the last weights are in the checkpoint only" in sentence()
    assert cli.main(["export", str(tmp_path / "e"), "--out", str(tmp_path / "f")]) == 2
    assert "is an exported generator: give the run or checkpoint it came from" in sentence()


def test_other_code_bases_get_their_state_dicts(tiny_run, tmp_path, capsys):
    out = tmp_path / "e"
    assert cli.main(["export", str(tiny_run), "--out", str(out), "--format", "studiogan,biggan-pytorch"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and all("differs from the checkpoint's samples by" in line for line in lines[:-1])
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md",
        "biggan-pytorch.pth",
        "samples.png",
        "studiogan.pth",
    ]
    card = (out / "README.md").read_text()
    assert "G.load_state_dict" in card and "Averaged weights after 2 steps on `shapes`" in card


def test_bad_options(tiny_run, tmp_path, sentence):
    assert cli.main(["export", str(tiny_run), "--out", str(tmp_path / "e"), "--format", "onnx,pickle"]) == 2
    assert (
        "format must be one or more of safetensors,onnx,torchscript,biggan-pytorch,studiogan, got 'pickle'"
        in sentence()
    )
    (tmp_path / "file").write_text("x")
    assert cli.main(["export", str(tiny_run), "--out", str(tmp_path / "file")]) == 2
    assert "--out must name a folder" in sentence()
    assert cli.main(["export", str(tiny_run), "--out", str(tmp_path / "model.onnx")]) == 2
    assert "--out must name a folder for the files, such as" in sentence()
    assert cli.main(["export", str(tmp_path / "none"), "--out", str(tmp_path / "e")]) == 2
    assert "there is no run folder or checkpoint" in sentence()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_export_that_does_not_reproduce_the_samples_is_an_error(tiny_run, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "read", lambda path: lambda *inputs: torch.zeros(1))
    with pytest.raises(RuntimeError, match="differs from the checkpoint's samples by"):
        cli.main(["export", str(tiny_run), "--out", str(tmp_path / "e")])
