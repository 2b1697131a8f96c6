"""What `sagan-fast attention` draws and refuses."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from sagan_fast import cli
from sagan_fast.commands.attention import read_points


@pytest.fixture
def run(tiny_run, capsys):
    def command(*args):
        assert cli.main(["attention", str(tiny_run), *map(str, args)]) == 0
        return capsys.readouterr().out

    return command


def test_the_generator_on_samples_with_a_sweep(run, tmp_path):
    out = run("--out", tmp_path / "a.png", "--sweep", tmp_path / "a.gif", "--count", 2, "--frames", 12)
    assert "attentions.16 of the generator: 16x16 queries, 8x8 pooled keys, gamma " in out
    figure = Image.open(tmp_path / "a.png")
    assert figure.width == 6 * 160 + 7 * 6 and figure.height > 2 * 160
    sweep = Image.open(tmp_path / "a.gif")
    assert 6 < sweep.n_frames <= 12 and f"{sweep.n_frames} frames in" in out


def test_the_discriminator_on_real_images_and_on_samples(run, tmp_path):
    args = ("--count", 3, "--points", "4,4 31,0", "--seed", 3)
    out = run("--out", tmp_path / "d.png", "--data", "shapes", *args)
    assert "attentions.16 of the discriminator" in out and "3 images in" in out
    assert Image.open(tmp_path / "d.png").width == 3 * 160 + 4 * 6
    first = (tmp_path / "d.png").read_bytes()
    run("--out", tmp_path / "d.png", "--data", "shapes", *args)
    assert (tmp_path / "d.png").read_bytes() == first
    run("--out", tmp_path / "f.png", "--network", "d", "--layer", "16", *args)
    assert (tmp_path / "f.png").read_bytes() != first


def test_an_exported_generator_and_one_class(run, tiny_run, tmp_path, sentence):
    assert cli.main(["export", str(tiny_run), "--out", str(tmp_path / "e")]) == 0
    args = ["--count", "1", "--class-id", "3", "--points", "3,4 20,30"]
    for where in (tiny_run, tmp_path / "e"):
        assert cli.main(["attention", str(where), "--out", str(tmp_path / f"{where.name}.png"), *args]) == 0
    a, b = (np.asarray(Image.open(tmp_path / name)).astype(int) for name in ("e.png", "run.png"))
    assert abs(a - b).max() <= 3  # on a GPU sigma is rounded otherwise
    assert cli.main(["attention", str(tmp_path / "e"), "--out", "x.png", "--data", "shapes"]) == 2
    assert "is an exported generator: the discriminator is in the checkpoint only" in sentence()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--out", "x.jpg"], "--out must name a .png file, got x.jpg"),
        (["--out", "x.png", "--sweep", "x.avi"], "--sweep must name a .gif, .apng, .png or .mp4 file, got x.avi"),
        (["--out", "x.png", "--points", "3"], "points must be auto or pairs of pixels such as '12,40 30,8', got '3'"),
        (["--out", "x.png", "--points", "3,32"], "points must lie in the image, x and y in 0 to 31, got 3,32"),
        (["--out", "x.png", "--count", "0"], "--count must be at least 1, got 0"),
        (["--out", "x.png", "--layer", "8"], "the generator has no attention layer '8': it has attentions.16"),
        (["--out", "x.png", "--data", "shapes", "--network", "g"], "which only the discriminator sees"),
        (["--out", "x.png", "--data", "shapes", "--truncation", "1"], "--truncation is for samples"),
        (["--out", "x.png", "--data", "folder:nowhere"], "nowhere"),
        (["--out", "x.png", "--class-id", "10"], "class-id must be 0 to 9, got 10"),
    ],
)
def test_bad_options(args, message, tiny_run, tmp_path, monkeypatch, sentence):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["attention", str(tiny_run), *args]) == 2
    assert message in sentence() and list(tmp_path.iterdir()) == []


def test_a_model_without_attention_is_a_sentence(tiny_run, tmp_path, sentence):
    copy = tmp_path / "run"
    shutil.copytree(tiny_run, copy)
    content = torch.load(copy / "checkpoints" / "last.pt", weights_only=True)
    for part in ("generator", "discriminator"):
        content["config"][part]["attention_resolutions"] = []
    for part in ("generator", "ema", "discriminator"):
        content[part] = {key: value for key, value in content[part].items() if not key.startswith("attentions")}
    torch.save(content, copy / "checkpoints" / "last.pt")
    assert cli.main(["attention", str(copy), "--out", str(tmp_path / "x.png")]) == 2
    assert "the generator has no attention layer, so there is nothing to look at" in sentence()


def test_points_are_read():
    assert read_points("3,4  10.5,0") == [(3.0, 4.0), (10.5, 0.0)]
