"""`sagan-fast faces` end to end, with random weights: they find whatever they find."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from sagan_fast import cli
from sagan_fast.faces import FaceBoxes
from sagan_fast.faces.weights import PUBLISHED, PUBLISHED_SHA256


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "w.pth"
    torch.manual_seed(0)
    torch.save(FaceBoxes().state_dict(), path)
    return str(path)


@pytest.fixture
def album(tmp_path, rng):
    folder = tmp_path / "album"
    (folder / "deep").mkdir(parents=True)
    for name, shape in (("a.png", (40, 60, 3)), ("deep/gray.png", (50, 30)), ("flat.png", (10, 300, 4))):
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(folder / name)
    return folder


def test_drawings_are_not_searched_for_faces(weights, album, sentence):
    for out in (album, album / "found"):
        assert cli.main(["faces", "detect", str(album), "--out", str(out), "--weights", weights]) == 2
        assert "drawings there would be searched for faces too" in sentence()


def test_detect_draws_and_lists(weights, album, tmp_path, capsys):
    out = tmp_path / "found"
    common = ["--weights", weights, "--device", "cpu"]
    assert cli.main(["faces", "detect", str(album), "--out", str(out), *common, "--min-score", "0.45"]) == 0
    report = json.loads((out / "faces.json").read_text())
    sizes = {image["file"]: (image["width"], image["height"]) for image in report["images"]}
    assert sizes == {"a.png": (60, 40), "flat.png": (300, 10), "deep/gray.png": (30, 50)}
    total = sum(len(image["faces"]) for image in report["images"])
    assert total > 0 and f"{total} faces in 3 pictures" in capsys.readouterr().out
    for image in report["images"]:
        assert Image.open(out / f"{image['file']}.png").size == (image["width"], image["height"])
        for face in image["faces"]:
            assert len(face["box"]) == 4 and 0.45 < face["score"] < 1
    assert cli.main(["faces", "detect", str(album / "a.png"), "--out", str(out), *common, "--min-score", "0.999"]) == 0
    report = json.loads((out / "faces.json").read_text())
    assert report["images"] == [{"file": "a.png", "width": 60, "height": 40, "faces": []}] and report["broken"] == {}


def test_crop_makes_a_folder_to_train_on(weights, album, tmp_path, capsys):
    out = tmp_path / "crops"
    args = ["faces", "crop", str(album), str(out), "--weights", weights, "--device", "cpu", "--size", "32"]
    assert cli.main([*args, "--min-score", "0.45", "--min-size", "1"]) == 0
    said = capsys.readouterr().out
    lines = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    assert lines and f"{len(lines)} crops of 3 photographs" in said and f"--data folder:{out}" in said
    assert all(Image.open(out / line["file"]).size == (32, 32) for line in lines)


def test_train_then_use_what_was_trained(tmp_path, rng, capsys):
    images = tmp_path / "images"
    images.mkdir()
    Image.fromarray(rng.integers(0, 256, (80, 90, 3), dtype=np.uint8)).save(images / "x.jpg")
    (tmp_path / "gt.txt").write_text("x.jpg\n1\n10 10 60 60 0 0 0 0 0 0\n")
    data = ["--annotations", str(tmp_path / "gt.txt"), "--images", str(images)]
    val = ["--val-annotations", str(tmp_path / "gt.txt"), "--val-images", str(images)]
    args = ["faces", "train", *data, *val, "--out", str(tmp_path / "run"), "--size", "64", "--batch-size", "2"]
    args += ["--device", "cpu", "--log-every", "1", "--decay-at", "[2]"]
    assert cli.main([*args, "--steps", "2"]) == 0
    said = capsys.readouterr().out
    assert "1 picture with 1 face" in said and "step 2/2" in said and "AP@.5" in said
    assert cli.main([*args, "--steps", "3", "--resume"]) == 0
    assert "step 3/3" in (said := capsys.readouterr().out) and "step 2/3" not in said
    trained = str(tmp_path / "run" / "last.pth")
    found = ["faces", "detect", str(images), "--out", str(tmp_path / "found"), "--weights", trained, "--device", "cpu"]
    assert cli.main(found) == 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["detekt"], "unknown action 'detekt' of faces: did you mean 'detect'?"),
        (["detect", "ALBUM", "--out", "x"], "--weights must be given"),
        (
            ["detect", "ALBUM", "--out", "x", "--weights", "/none.pth"],
            f"{PUBLISHED} (its SHA-256 is {PUBLISHED_SHA256}",
        ),
        (["detect", "ALBUM", "--out", "x", "--weights", "ALBUM/a.png"], "does not hold FaceBoxes weights"),
        (["detect", "/none", "--out", "x", "--weights", "WEIGHTS"], "/none does not exist"),
        (["detect", "ALBUM/bad", "--out", "x", "--weights", "WEIGHTS"], "broken.png cannot be read"),
        (["crop", "ALBUM", "ALBUM", "--weights", "WEIGHTS"], "is not an empty folder"),
        (["crop", "ALBUM", "x", "--weights", "WEIGHTS", "--size", "0"], "--size must be at least 1"),
        (["crop", "ALBUM", "x", "--weights", "WEIGHTS", "--min-score", "2"], "--min-score must be between 0 and 1"),
        (
            ["detect", "ALBUM", "--out", "x", "--weights", "WEIGHTS", "--precision", "int4"],
            "--precision must be one of",
        ),
        (
            ["detect", "ALBUM", "--out", "x", "--weights", "WEIGHTS", "--max-side", "-1"],
            "--max-side must be at least 0",
        ),
        (["train", "--annotations", "/none.txt", "--images", "x", "--out", "x"], "/none.txt cannot be read"),
        (["train", "--annotations", "/n", "--images", "x", "--out", "x", "--val-images", "y"], "belong together"),
        (["export", "--weights", "WEIGHTS", "--out", "x.pt"], "--out must name an .onnx file"),
        (["bench", "--weights", "WEIGHTS", "--threads", "0"], "--threads must be at least 1"),
    ],
)
def test_bad_input_is_a_sentence_and_status_2(args, message, weights, album, tmp_path, monkeypatch, sentence):
    monkeypatch.chdir(tmp_path)
    (album / "bad").mkdir()
    (album / "bad" / "broken.png").write_bytes(b"no picture")
    before = sorted(tmp_path.iterdir())
    args = [a.replace("ALBUM", str(album)).replace("WEIGHTS", weights) for a in args]
    assert cli.main(["faces", *args]) == 2
    assert message in sentence()
    assert sorted(tmp_path.iterdir()) == before


def test_help_is_there_for_all_and_for_each(capsys):
    assert cli.main(["faces", "--help"]) == 0
    for action in ("detect", "crop", "train", "export", "bench"):
        assert f"  {action}" in capsys.readouterr().out or action != "detect"
        with pytest.raises(SystemExit) as stop:
            cli.main(["faces", action, "--help"])
        assert stop.value.code == 0
    assert "--rounds" in capsys.readouterr().out


def test_skipping_what_is_broken(weights, album, tmp_path, capsys):
    (album / "broken.png").write_bytes(b"no picture")
    args = ["faces", "detect", str(album), "--out", str(tmp_path / "f"), "--weights", weights, "--device", "cpu"]
    assert cli.main([*args, "--on-broken", "skip"]) == 0
    assert "left out:" in capsys.readouterr().out
    assert list(json.loads((tmp_path / "f" / "faces.json").read_text())["broken"]) == ["broken.png"]
