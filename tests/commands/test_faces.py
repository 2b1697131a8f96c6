"""`sagan-fast faces` end to end, with random weights: they find whatever they find."""

import json
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from sagan_fast import cli
from sagan_fast.faces import FaceBoxes
from sagan_fast.faces.augment import augment
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
        assert "drawings there would be searched for faces" in sentence()


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


@pytest.fixture
def to_train(tmp_path, rng):
    """Options of a tiny training, on a picture with a face and one without, which has WIDER FACE's line of zeros."""
    images = tmp_path / "images"
    images.mkdir()
    for name in "xy":
        Image.fromarray(rng.integers(0, 256, (80, 90, 3), dtype=np.uint8)).save(images / f"{name}.jpg")
    (tmp_path / "gt.txt").write_text("x.jpg\n1\n10 10 60 60 0 0 0 0 0 0\ny.jpg\n0\n0 0 0 0 0 0 0 0 0 0\n")
    args = ["faces", "train", "--annotations", str(tmp_path / "gt.txt"), "--images", str(images)]
    args += ["--out", str(tmp_path / "run"), "--size", "64", "--batch-size", "2"]
    return [*args, "--device", "cpu", "--log-every", "1", "--decay-at", "[2]"]


def test_train_then_use_what_was_trained(to_train, tmp_path, capsys):
    val = ["--val-annotations", str(tmp_path / "gt.txt"), "--val-images", str(tmp_path / "images")]
    assert cli.main([*to_train, *val, "--steps", "2"]) == 0
    said = capsys.readouterr().out
    assert "training: 2 pictures with 1 face, 1 picture without" in said and "validation: 2 pictures" in said
    assert "step 2/2" in said and "AP@.5" in said and "0:00:00 left" in said
    assert cli.main([*to_train, "--steps", "3", "--resume"]) == 0
    said = capsys.readouterr().out
    assert "step 3/3" in said and "step 2/3" not in said and "last.pth: going on at step 2; steps 2 is now 3" in said
    trained = str(tmp_path / "run" / "last.pth")
    found = ["faces", "detect", str(tmp_path / "images"), "--out", str(tmp_path / "found"), "--weights", trained]
    assert cli.main([*found, "--device", "cpu"]) == 0


def test_ctrl_c_loses_nothing(to_train, tmp_path, monkeypatch, capfd):
    def interrupted(*args):
        signal.raise_signal(signal.SIGINT)
        return augment(*args)

    monkeypatch.setattr("sagan_fast.faces.samples.augment", interrupted)
    assert cli.main([*to_train, "--steps", "9"]) == 0  # the second signal at once is the echo of the first
    said = capfd.readouterr()
    assert "stopping after this step" in said.err
    assert f"{tmp_path / 'run'}: stopped as asked at step 1; the same command with --resume goes on" in said.out
    assert torch.load(tmp_path / "run" / "last.pth", weights_only=True)["step"] == 1
    monkeypatch.setattr("sagan_fast.training.signals.IMPATIENCE", -1.0)
    assert cli.main([*to_train, "--steps", "9", "--resume"]) == 130
    assert "run: interrupted; --resume goes on from last.pth" in capfd.readouterr().err


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
