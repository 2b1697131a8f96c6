import json

import numpy as np
import torch
from foreign_networks import CLASSES, Discriminator, Generator, trained
from PIL import Image

import sagan_fast
from sagan_fast import cli
from sagan_fast.models import export
from shared_by_tests import tiny_extractor_file


def test_an_imported_folder_is_used_like_an_exported_one(tmp_path, capsys, monkeypatch):
    theirs = trained(Generator("voletiv"))
    torch.save({"G_state_dict": theirs.state_dict(), "step": 4}, tmp_path / "ckpt.pth")
    folder = tmp_path / "in" / "e"
    assert cli.main(["import", str(tmp_path / "ckpt.pth"), "--out", str(folder)]) == 0
    assert "generator of 32x32, 5 classes, channels 24,16,8,8, attention at 8x8" in capsys.readouterr().out
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "samples.png",
    ]
    assert json.loads((folder / "config.json").read_text())["origin"] == "Imported from `ckpt.pth`"
    ours = sagan_fast.Generator.from_pretrained(folder)
    z, y = export.example(ours, 4)
    assert float((ours(z, y) - theirs(z, y)).abs().max()) < 1e-5 and ours.config.num_classes == CLASSES
    card = (folder / "README.md").read_text()
    assert "Imported from `ckpt.pth`; " in card and str(tmp_path) not in card
    assert cli.main(["sample", str(folder), "--out", str(tmp_path / "a.png"), "--grid", "--count", "4"]) == 0
    assert np.asarray(Image.open(tmp_path / "a.png")).ndim == 3
    assert cli.main(["attention", str(folder), "--out", str(tmp_path / "b.png")]) == 0
    monkeypatch.setenv("SAGAN_FAST_CACHE", str(tmp_path))
    features = tiny_extractor_file(tmp_path / "features.pt")
    real = tmp_path / "real"
    for i in range(CLASSES):
        (real / f"class{i}").mkdir(parents=True)
        for k in range(4):
            pixels = np.random.default_rng(k).integers(0, 255, (32, 32, 3), np.uint8)
            Image.fromarray(pixels).save(real / f"class{i}" / f"{k}.png")
    options = ["--features", str(features), "--device", "cpu", "--count", "20", "--json", str(tmp_path / "s.json")]
    assert cli.main(["evaluate", str(folder), "--data", f"folder:{real}", *options]) == 0
    assert "Imported from `ckpt.pth`" in json.loads((tmp_path / "s.json").read_text())["protocol"]["generated"]["data"]


def test_bad_sources_are_a_sentence(tmp_path, sentence):
    torch.save(Discriminator("voletiv").state_dict(), tmp_path / "d.pth")
    for args, said in (
        ([str(tmp_path / "none.pth")], "there is no file"),
        ([str(tmp_path / "d.pth")], "must hold a generator of voletiv"),
        ([str(tmp_path / "d.pth"), "--layout", "keras"], "layout"),
    ):
        assert cli.main(["import", *args, "--out", str(tmp_path / "e")]) == 2
        assert said in sentence()
    (tmp_path / "file").write_text("x")
    assert cli.main(["import", str(tmp_path / "d.pth"), "--out", str(tmp_path / "file")]) == 2
    assert "--out must name a folder" in sentence() and not (tmp_path / "e").exists()
