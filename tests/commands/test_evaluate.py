"""What `sagan-fast evaluate` writes, prints and refuses."""

import contextlib
import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from sagan_fast import cli
from shared_by_tests import run_ranks, tiny_extractor_file


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SAGAN_FAST_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def features(tmp_path):
    return str(tiny_extractor_file(tmp_path / "f.pt"))


def pictures(folder, count=12, size=(20, 20), seed=0):
    """Write `count` PNGs of noise over one colour an image and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for i in range(count):
        pixels = rng.integers(0, 200, 3)[None, None] + rng.integers(0, 56, (size[1], size[0], 3))
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i:03d}.png")
    return folder


def test_a_run_is_scored_and_the_result_written(tiny_run, tmp_path, features, capsys):
    target = tmp_path / "out" / "scores.json"
    what = ["evaluate", str(tiny_run), "--data", "shapes", "--count", "40", "--reference-count", "80"]
    assert cli.main([*what, "--features", features, "--json", str(target)]) == 0
    result = json.loads(target.read_text())
    shown = capsys.readouterr().out
    assert "average weights of step 2: 40 images against 80 of shapes" in shown and f"{result['fid']:.5g}" in shown
    assert "worst classes: " in shown and "note: 40 images do not" not in shown
    assert result["protocol"]["generated"]["checkpoint"].endswith("last.pt")

    assert cli.main([*what, "--features", features, "--json", str(target), "--last"]) == 0
    last = json.loads(target.read_text())
    assert last["protocol"]["weights"] == "last" and last["fid"] != result["fid"]


def test_a_folder_of_samples_scores_as_the_checkpoint_they_came_from(tiny_run, tmp_path, features):
    found = {}
    rest = ["--data", "shapes", "--reference-count", "60", "--features", features, "--kid-subsets", "5"]
    rest += ["--metrics", "fid,is,kid,prdc"]
    assert cli.main(["sample", str(tiny_run), "--count", "30", "--out", str(tmp_path / "samples"), "--seed", "3"]) == 0
    for name, source in (("run", [str(tiny_run), "--count", "30"]), ("folder", [str(tmp_path / "samples")])):
        target = tmp_path / f"{name}.json"
        assert cli.main(["evaluate", *source, "--seed", "3", *rest, "--json", str(target)]) == 0
        found[name] = json.loads(target.read_text())
    for key in ("fid", "is", "kid", "precision", "recall", "density", "coverage"):
        assert found["folder"][key] == pytest.approx(found["run"][key], rel=1e-3, abs=1e-6), key
    protocol = found["folder"]["protocol"]
    assert protocol["weights"] is None and protocol["generated"]["data"].startswith("folder:")


def test_gray_transparent_and_turned_images_are_handled(tmp_path, features):
    """As the trainer handles them: gray in three channels, transparency over white, EXIF upright."""
    real, odd = pictures(tmp_path / "real"), pictures(tmp_path / "odd")
    Image.open(odd / "000.png").convert("L").save(odd / "000.png")
    rgba = Image.open(odd / "001.png").convert("RGBA")
    rgba.putalpha(0)
    rgba.save(odd / "001.png")
    Image.open(odd / "002.png").convert("P").save(odd / "002.png")

    plain = pictures(tmp_path / "plain")
    for name, pixels in (("000", Image.open(plain / "000.png").convert("L").convert("RGB")),
                         ("001", Image.new("RGB", (20, 20), "white")),
                         ("002", Image.open(plain / "002.png").convert("P").convert("RGB"))):  # fmt: skip
        pixels.save(plain / f"{name}.png")
    found = []
    for folder in (odd, plain):
        target = tmp_path / "scores.json"
        options = ["--data", f"folder:{real}", "--features", features, "--json", str(target), "--kid-subsets", "2"]
        assert cli.main(["evaluate", str(folder), *options]) == 0
        found.append(json.loads(target.read_text()))
    assert found[0]["fid"] == pytest.approx(found[1]["fid"], rel=1e-9) and found[0]["fid"] > 0.1


@pytest.mark.parametrize("which", ["generated", "real"])
def test_a_broken_image_is_refused_by_name(which, tmp_path, features, sentence):
    for name in ("generated", "real"):
        pictures(tmp_path / name)
    path = tmp_path / which / "004.png"
    path.write_bytes(path.read_bytes()[:90])
    what = ["evaluate", str(tmp_path / "generated"), "--data", f"folder:{tmp_path / 'real'}", "--features", features]
    assert cli.main(what) == 2
    assert f"{path} cannot be read" in sentence()
    assert cli.main([*what, "--num-workers", "1"]) == 2
    assert f"{path} cannot be read" in sentence()


def test_a_mis_sized_image_is_refused_by_name_or_resized_when_asked(tmp_path, features, sentence, capsys):
    real, generated = pictures(tmp_path / "real", size=(40, 30)), pictures(tmp_path / "generated")
    Image.new("RGB", (24, 20)).save(generated / "007.png")
    what = ["evaluate", str(generated), "--data", f"folder:{real}", "--features", features, "--kid-subsets", "2"]
    assert cli.main(what) == 2
    assert f"{generated / '007.png'} has 24x20 pixels where 20x20 are expected: give --resolution R" in sentence()
    assert cli.main([*what, "--resolution", "16"]) == 0
    assert "12 images against 12" in capsys.readouterr().out
    Image.new("RGB", (24, 20)).save(generated / "000.png")
    assert cli.main(what) == 2
    assert f"{generated / '000.png'} has 24x20 pixels and is not square: give --resolution R" in sentence()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["--features", "vgg16"],
            "features must be one of inception, dinov2, efficientnet-lite0 or a TorchScript file",
        ),
        (["--features", "F", "--protocol", "dirty"], "protocol must be one of clean, official, got 'dirty'"),
        (
            ["--features", "F", "--metrics", "fid,ssim"],
            "--metrics must be all, or some of fid,is,kid,prdc,intra_fid,face-rate,gan-test, got ssim",
        ),
        (["--features", "F", "--metrics", "fid,face_rat"], "got face_rat: did you mean 'face-rate'?"),
        (["--features", "F", "--metrics", "all,ssim"], "face-rate,gan-test, got ssim"),
        (["--features", "F", "--metrics", "is", "--count", "5"], "--splits must be at most the count, got 10 for 5"),
        (["--features", "F", "--truncation", "-1"], "truncation must be positive"),
        (["--features", "F", "--resolution", "16"], "--resolution is for folders of images"),
        (["--features", "F", "--conut", "16"], "unknown option --conut: did you mean '--count'?"),
        (["--features", "F", "--json", "."], "--json must name a file"),
        (
            ["--features", "F", "--batch-norm", "eval"],
            "--batch-norm must be one of running, batch, standing, got 'eval'",
        ),
    ],
)
def test_bad_options(args, message, tiny_run, features, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = [features if arg == "F" else arg for arg in args]
    assert cli.main(["evaluate", str(tiny_run), "--data", "shapes", "--count", "12", *args]) == 2
    assert message in sentence()


@pytest.mark.parametrize(
    ("generated", "args", "message"),
    [
        ("nothing", [], "there is no run folder or checkpoint nothing"),
        ("pictures", ["--count", "13"], "folder:pictures has 12 images, and 13 are asked for"),
        ("pictures", ["--truncation", "0.5"], "truncation is for checkpoints, and pictures holds images"),
        ("pictures", ["--last"], "last is for checkpoints"),
        ("empty", [], "holds no images"),
    ],
)
def test_bad_sources(generated, args, message, features, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pictures(tmp_path / "pictures")
    (tmp_path / "empty").mkdir()
    assert cli.main(["evaluate", generated, "--data", "folder:pictures", "--features", features, *args]) == 2
    assert message in sentence()


def command(folder, args):
    """Run `sagan-fast args` as one of torchrun's processes; what it says of errors goes to folder/err-RANK."""
    with (folder / f"err-{os.environ['RANK']}").open("w") as err, contextlib.redirect_stderr(err):
        return cli.main(args)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--device", "tpu"], "--device must be one of auto, cpu, cuda, got 'tpu'"),
        (["--features", "nothing.pt"], "there is no feature file nothing.pt"),
    ],
)
def test_of_two_processes_the_first_says_what_is_wrong(args, message, tmp_path):
    real = pictures(tmp_path / "real")
    args = ["evaluate", str(real), "--data", f"folder:{real}", "--features", "nothing.pt", "--device", "cpu", *args]
    assert run_ranks(command, 2, tmp_path, args) == [2, 2]
    assert (tmp_path / "err-0").read_text() == f"sagan-fast: {message}\n" and (tmp_path / "err-1").read_text() == ""


@pytest.mark.slow  # sharing itself is held by tests/evaluation/test_streams.py
def test_two_processes_score_as_one(tiny_run, tmp_path, features):
    """As under torchrun; 45 is divisible by neither processes nor batches. Standing statistics are the same on both."""
    what = ["evaluate", str(tiny_run), "--data", "shapes", "--count", "45", "--reference-count", "70"]
    what += ["--features", features, "--batch-size", "8", "--kid-subsets", "3", "--batch-norm", "standing"]
    what += ["--standing-batches", "2"]
    assert cli.main([*what, "--json", str(tmp_path / "one.json")]) == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    common["SAGAN_FAST_CACHE"] = str(tmp_path / "second cache")
    program = [sys.executable, "-m", "sagan_fast.cli", *what, "--json", str(tmp_path / "two.json")]
    processes = [
        subprocess.Popen(program, env={**os.environ, **common, "RANK": str(rank)}, stdout=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    printed = [process.communicate(timeout=200)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0] and "FID" in printed[0] and printed[1] == ""
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert two["protocol"].pop("processes") == 2 and one["protocol"].pop("processes") == 1
    assert two["protocol"] == one["protocol"]
    for key in ("fid", "is", "is_std", "kid", "kid_std", "precision", "recall", "density", "coverage", "intra_fid"):
        assert two[key] == pytest.approx(one[key], rel=1e-4, abs=1e-6), key


def test_a_packed_set_scores_as_the_folder_it_was_made_from(tmp_path, features):
    real, generated = pictures(tmp_path / "real", seed=1), pictures(tmp_path / "generated")
    assert cli.main(["prepare", str(generated), str(tmp_path / "g"), "--size", "20"]) == 0
    assert cli.main(["prepare", str(real), str(tmp_path / "r"), "--size", "20"]) == 0
    found = []
    for one, two in ((str(generated), f"folder:{real}"), (f"packed:{tmp_path / 'g'}", f"packed:{tmp_path / 'r'}")):
        target = tmp_path / "scores.json"
        assert cli.main(["evaluate", one, "--data", two, "--features", features, "--json", str(target)]) == 0
        found.append(json.loads(target.read_text()))
    assert found[0]["fid"] == pytest.approx(found[1]["fid"], rel=1e-9)
    assert found[0]["protocol"]["real"]["fingerprint"] != found[1]["protocol"]["real"]["fingerprint"]


def test_classes_of_a_checkpoint_against_others(tiny_run, tmp_path, features, sentence):
    real = tmp_path / "real"
    for name in ("ant", "bee"):
        pictures(real / name, count=3, size=(32, 32))
    what = ["evaluate", str(tiny_run), "--data", f"folder:{real}", "--features", features, "--count", "10"]
    assert cli.main(what) == 2
    said = sentence()
    assert "real has other classes than" in said and "it has ant, bee (2 against 10 classes)" in said
    assert "--metrics without intra_fid" in said
    target = tmp_path / "scores.json"
    assert cli.main([*what, "--metrics", "fid", "--json", str(target)]) == 0
    flat = ["evaluate", str(tiny_run), "--data", f"folder:{real / 'ant'}", "--features", features, "--count", "10"]
    assert cli.main([*flat, "--json", str(target)]) == 0
    assert any(note.startswith("no intra-FID") for note in json.loads(target.read_text())["notes"])


def test_broken_and_unread_files_are_said(tmp_path, features, sentence, capsys):
    real, generated = pictures(tmp_path / "real"), pictures(tmp_path / "generated", seed=1)
    (real / "003.png").write_bytes(b"")
    (real / "note.txt").write_text("x")
    target = tmp_path / "scores.json"
    what = ["evaluate", str(generated), "--data", f"folder:{real}", "--features", features, "--resolution", "20"]
    assert cli.main(what) == 2 and "003.png cannot be read" in sentence()
    assert cli.main([*what, "--on-broken", "skip", "--json", str(target)]) == 0
    result = json.loads(target.read_text())
    assert "1 of the real images could not be read: others of their classes stand in for them" in result["notes"]
    assert "passed over beside the real images: 1 .txt" in result["notes"]
    assert result["protocol"]["real"]["passed_over"] == {".txt": 1}
    fingerprint = result["protocol"]["real"]["fingerprint"][:8]
    assert f"real images {fingerprint}" in capsys.readouterr().out.replace("\n", " ")


def test_the_readme_on_the_original_tiny_imagenet(tmp_path, features, capsys):
    root, rng = tmp_path / "tiny-imagenet", np.random.default_rng(0)
    lines = []
    for name in ("n02", "n01"):
        pictures(root / "train" / name / "images", count=4, size=(64, 64), seed=int(rng.integers(99)))
        (root / "train" / name / f"{name}_boxes.txt").write_text("000.png\t0\t0\t62\t62\n")
        lines += [f"00{len(lines) + i}.png\t{name}\t0\t0\t62\t62\n" for i in range(2)]
    pictures(root / "val" / "images", count=4, size=(64, 64))
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    run = str(tmp_path / "run")
    small = ["--steps=1", "--batch-size=4", "--device=cpu"]
    small += [f"--{network}.base-channels=2" for network in ("generator", "discriminator")]
    what = ["train", "--preset", "tiny-imagenet-64", "--data", f"folder:{root / 'train'}", "--num-classes", "2"]
    assert cli.main([*what, "--out", run, *small]) == 0
    said = capsys.readouterr().out
    assert "labels from sub-folders: 2 classes, 0 n01, 1 n02" in said and "passed over: 2 .txt" in said
    assert (tmp_path / "run" / "data.png").exists()
    target = tmp_path / "scores.json"
    score = ["evaluate", run, "--features", features, "--count", "12", "--json", str(target)]
    for data in ("train", "val"):
        assert cli.main([*score, "--data", f"folder:{root / data}", "--on-broken", "skip"]) == 0
        assert list(json.loads(target.read_text())["intra_fid_per_class"]) == ["n01", "n02"]
    assert cli.main(["sample", run, "--out", str(tmp_path / "goldfish"), "--class-id", "0", "--count", "12"]) == 0
    one = ["evaluate", str(tmp_path / "goldfish"), "--data", f"folder:{root / 'train' / 'n01'}", "--features", features]
    assert cli.main([*one, "--metrics", "fid"]) == 0


@pytest.fixture
def face_weights(tmp_path):
    import torch

    from sagan_fast.faces import FaceBoxes

    torch.save(FaceBoxes().state_dict(), tmp_path / "faces.pth")
    return str(tmp_path / "faces.pth")


def test_face_rate_alone_needs_no_features_and_beside_others_joins_them(tmp_path, features, face_weights, capsys):
    for name in ("fake", "real"):
        pictures(tmp_path / name, 6)
    what = ["evaluate", str(tmp_path / "fake"), "--data", f"folder:{tmp_path / 'real'}", "--device", "cpu"]
    what += ["--face-weights", face_weights, "--json", str(tmp_path / "s.json"), "--splits", "1"]
    assert cli.main([*what, "--metrics", "face-rate"]) == 0
    alone = json.loads((tmp_path / "s.json").read_text())
    assert 0 <= alone["face_rate"] <= 1 and (alone["face_rate_of"], alone["face_rate_real_of"]) == (6, 6)
    assert "fid" not in alone and alone["protocol"]["faces"]["detector"] == "FaceBoxes"
    assert f"face-rate: {alone['face_rate']:.4f} of 6 generated images have a face" in capsys.readouterr().out
    assert cli.main([*what, "--metrics", "face_rate,all", "--features", features]) == 0
    both = json.loads((tmp_path / "s.json").read_text())
    assert "kid" in both
    assert both["face_rate"] == alone["face_rate"] and both["fid"] == pytest.approx(0, abs=1e-3)
    assert len(both["protocol"]["faces"]["sha256"]) == 64 and both["protocol"]["features"]


def test_face_rate_without_weights_is_refused(tmp_path, features, sentence):
    what = ["evaluate", str(pictures(tmp_path / "a")), "--data", "shapes", "--metrics", "face-rate"]
    assert cli.main(what) == 2
    assert "the metric face-rate needs --face-weights FILE: the published FaceBoxesProd.pth is described" in sentence()


def test_gan_test_alone_needs_no_features_and_beside_others_joins_them(tmp_path, features, capsys, monkeypatch):
    monkeypatch.setattr("sagan_fast.evaluation.gan_test.IMAGES_SEEN", 300)
    for label, folder in enumerate(("a", "b")):
        pictures(tmp_path / "real" / folder, 10, seed=label)
    what = ["evaluate", f"folder:{tmp_path / 'real'}", "--data", f"folder:{tmp_path / 'real'}", "--resolution", "8"]
    what += ["--json", str(tmp_path / "s.json"), "--splits", "1", "--metrics"]
    assert cli.main([*what, "gan-test"]) == 0
    alone = json.loads((tmp_path / "s.json").read_text())
    assert "fid" not in alone and alone["gan_test_of"] == 20 and set(alone["gan_test_per_class"]) == {"a", "b"}
    last = capsys.readouterr().out.splitlines()[-2]
    assert (
        last.startswith(f"gan-test: {alone['gan_test']:.3f} of 20 generated images show their class") and "b " in last
    )
    assert cli.main([*what, "gan_test,fid", "--features", features]) == 0
    both = json.loads((tmp_path / "s.json").read_text())
    assert both["gan_test"] == alone["gan_test"] and both["fid"] == pytest.approx(0, abs=1e-3)


def test_gan_test_of_images_without_classes_is_refused(tmp_path, sentence):
    assert cli.main(["evaluate", str(pictures(tmp_path / "a")), "--data", "shapes", "--metrics", "gan-test"]) == 2
    assert "gan-test needs generated images with classes, and these have none" in sentence()
