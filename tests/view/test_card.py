"""The model card is read as Hugging Face reads it, and its code runs."""

import json
from types import SimpleNamespace

import pytest
import torch
import yaml
from PIL import Image

from sagan_fast import Generator, cli
from sagan_fast.models import export
from sagan_fast.view.card import header, samples_of, save_card, scores_of, shortened

ABOUT = {"step": 7, "weights": "averaged", "data": "cifar10:data/cifar"}


def result(step=7, weights="average", features="inception", **scores):
    protocol = {
        "name": "clean", "count": 50000, "reference_count": 50000, "truncation": None,
        "features": {"name": features}, "real": {"data": "folder:/home/someone/data/photos/train"},
        "generated": {"step": step, "weights": weights},
    }  # fmt: skip
    return {**(scores or {"fid": 12.345678, "is": 8.5}), "notes": ["a note"], "protocol": protocol}


def parsed(card):
    _, head, text = card.split("---\n", 2)
    return yaml.safe_load(head), text


def small(num_classes=10, **overrides):
    torch.manual_seed(3)
    model = Generator.from_preset("shapes-32", base_channels=2, num_classes=num_classes, **overrides)
    model.class_names = tuple(f"class no. {i}" for i in range(num_classes))
    return model.requires_grad_(False).eval()


def test_the_card_says_what_it_is_and_how_each_file_is_used(tmp_path):
    model = small()
    export.save_folder(model, tmp_path, ABOUT)
    save_card(model, tmp_path, ABOUT, [export.WEIGHTS, export.ONNX, export.TORCHSCRIPT], [result()], "cc-by-4.0")
    head, text = parsed((tmp_path / "README.md").read_text())
    assert head["license"] == "cc-by-4.0" and head["library_name"] == "sagan_fast"
    assert head["pipeline_tag"] == "unconditional-image-generation" and {"sagan", "gan", "onnx"} < set(head["tags"])
    assert head["datasets"] == ["uoft-cs/cifar10"]
    assert "Averaged weights after 7 steps on `cifar10:data/cifar`" in text and "9 class no. 9" in text
    assert "| FID (inception) | 12.35 |" in text and "| IS (inception) | 8.5 |" in text and "- a note" in text
    protocol = "Protocol clean; 50000 generated images against 50000 of folder:photos/train; features inception"
    assert (
        f"{protocol}; no truncation.\n" in text
        and "/home" not in text
        and "; a row for each class, the same z in a column." in text
    )
    picture = Image.open(tmp_path / "samples.png")
    assert "](samples.png)" in text and picture.height == 10 * 66 - 2 + 12
    code = text.split("```python\n")[1].split("```")[0].replace(f'"{tmp_path.name}"', repr(str(tmp_path)))
    names = {}
    exec(code, names)
    assert names["images"].shape == (8, 3, 32, 32)


def test_scores_are_in_the_header_with_their_protocol():
    head = yaml.safe_load(header("mine", ABOUT, [], [result(), result(features="dinov2", fid=3.25)], "unknown"))
    (model,) = head["model-index"]
    first, second = model["results"]
    assert model["name"] == "mine" and first["task"] == {"type": head["pipeline_tag"]}
    assert first["dataset"] == {"name": "folder:photos/train", "type": "folder"}
    assert [(m["type"], m["value"]) for m in first["metrics"]] == [("fid", 12.346), ("inception_score", 8.5)]
    assert all("50000 generated images against 50000" in m["args"] for m in first["metrics"])
    (other,) = second["metrics"]  # FID is a name for Inception's features alone
    assert other["type"] == "fd" and other["name"] == "FD (dinov2)" and other["value"] == 3.25


def test_what_is_not_known_is_left_out(tmp_path):
    save_card(small(0), tmp_path, {"origin": "Imported from `G.pth`", "weights": "averaged"}, [export.WEIGHTS])
    head, text = parsed((tmp_path / "README.md").read_text())
    assert not {"datasets", "model-index"} & set(head) and head["license"] == "unknown" and "onnx" not in head["tags"]
    assert "no classes" in text and "Imported from `G.pth`" in text and "Scores" not in text
    assert "randint" not in text and "onnx" not in text and "Samples, not selected." in text


def test_only_scores_of_the_exported_weights_count():
    results = [result(7), result(6), result(7, "last"), result(None)]
    assert scores_of(results, ABOUT) == results[:1]
    assert scores_of(results, {**ABOUT, "weights": "last"}) == results[2:3]


@pytest.mark.parametrize(("resolution", "rows", "columns"), [(32, 10, 8), (256, 4, 4)])
def test_the_grid_has_a_sensible_size(resolution, rows, columns, monkeypatch):
    shape = (columns * rows, 3, resolution, resolution)
    monkeypatch.setattr("sagan_fast.view.card.sample", lambda generator, z, y: [torch.zeros(len(z), *shape[1:])])
    config = SimpleNamespace(resolution=resolution, num_classes=1000, z_dim=8)
    picture, words = samples_of(SimpleNamespace(config=config, class_names=()))
    side = max(64, resolution) + 2
    assert picture.shape[1] == rows * side + 10 and columns * side < picture.shape[2] < columns * side + 2 * side + 30
    assert words == f"; a row for each of {rows} classes, the same z in a column"


def test_export_writes_the_scores_of_the_run(tiny_run, tmp_path, capsys):
    import shutil

    run = shutil.copytree(tiny_run, tmp_path / "run")
    (run / "evaluation").mkdir(exist_ok=True)
    (run / "evaluation" / "step-00000002.json").write_text(json.dumps(result(2)))
    assert cli.main(["export", str(run), "--out", str(tmp_path / "e"), "--license", "apache-2.0"]) == 0
    assert "README.md: model card, with 1 evaluation and samples.png" in capsys.readouterr().out
    head, _ = parsed((tmp_path / "e" / "README.md").read_text())
    assert head["model-index"][0]["results"][0]["metrics"][0]["value"] == 12.346 and head["license"] == "apache-2.0"


def test_the_machines_paths_stay_on_the_machine():
    assert shortened("shapes") == "shapes"
    assert shortened("folder:/home/someone/data/tiny/train") == "folder:tiny/train"
    assert shortened("folder:/train") == "folder:/train"
