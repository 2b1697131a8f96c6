"""What `sagan-fast sample` writes and refuses."""

import numpy as np
import pytest
import torch
from PIL import Image

from sagan_fast import cli
from sagan_fast.commands.sample import read_classes, read_truncations
from sagan_fast.data import open_dataset
from sagan_fast.errors import InputError
from sagan_fast.evaluation.sampling import latents, sample, truncated
from sagan_fast.models.checkpoint import load_generator
from sagan_fast.visualize.drawing import enlarged
from sagan_fast.visualize.grids import to_uint8


def cells(path, rows, columns):
    """The images of a PNG of rows, without the labels, (rows * columns, 3, 64, 64)."""
    picture = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)
    assert picture.shape[1] == 66 * rows - 2 + 12
    inner = picture[:, 6:, picture.shape[2] - 6 - (66 * columns - 2) :]
    return torch.stack(
        [inner[:, 66 * r : 66 * r + 64, 66 * c : 66 * c + 64] for r in range(rows) for c in range(columns)]
    )


def expected(tiny_run, z, y):
    return enlarged(to_uint8(torch.cat(list(sample(load_generator(tiny_run), z, y)))), 64)


def same(a, b):
    return (a.int() - b.int()).abs().max() <= 1  # rounding: batches of another size


def test_sample_writes_a_grid_or_single_images(tiny_run, tmp_path, capsys):
    assert cli.main(["sample", str(tiny_run), "--out", str(tmp_path / "g.png"), "--count", "12", "--grid"]) == 0
    assert (tmp_path / "g.png").stat().st_size > 1000
    one = [
        "sample",
        str(tiny_run / "checkpoints" / "last.pt"),
        "--count",
        "3",
        "--class-id",
        "7",
        "--truncation",
        "0.5",
    ]
    for folder in ("a", "b"):
        assert cli.main([*one, "--out", str(tmp_path / folder), "--seed", "5"]) == 0
    names = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert names == ["000000_class7.png", "000001_class7.png", "000002_class7.png"]
    assert all((tmp_path / "a" / n).read_bytes() == (tmp_path / "b" / n).read_bytes() for n in names)
    assert "3 images in" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--out", "x.png", "--class-id", "10", "--grid"], "class-id must be 0 to 9, got 10"),
        (["--out", "x.png", "--count", "0", "--grid"], "--count must be at least 1, got 0"),
        (["--out", "x.png", "--truncation", "-1", "--grid"], "truncation must be positive, got -1.0"),
        (["--out", "x.jpg", "--grid"], "must name a .png file with --grid, got x.jpg"),
        (["--out", "x.png", "--truncation", "0.5,much"], "truncation must be numbers or none, such as 0.5 or"),
        (["--out", "x.png", "--truncation", "0.5,-1"], "truncation must be positive, got -1.0"),
        (["--out", "x", "--truncation", "0.5,1"], "--out must name a .png file with several truncations, got x"),
        (["--out", "x.png", "--by-class", "--interpolate"], "--by-class and --interpolate both make rows"),
        (
            ["--out", "x.png", "--by-class", "--classes", "3,12"],
            "classes must be 0 to 9, got 12",
        ),
        (["--out", "x.png", "--by-class", "--class-id", "3"], "--classes chooses the rows"),
        (["--out", "x.png", "--grid", "--to-class", "3"], "--to-class goes with --interpolate only"),
        (["--out", "x.png", "--interpolate", "--same-z"], "--same-z without --to-class would not change anything"),
        (["--out", "x.png", "--interpolate", "--to-class", "10"], "to-class must be 0 to 9, got 10"),
        (["--out", "s1.png"], "--out s1.png names one picture, and each image is a file of its own: add --grid"),
        (["--out", "s1.jpg", "--count", "1"], "add --grid for one picture of all, or name a folder, such as s1"),
        (["--out", "x", "--class-id", "rng"], "there is no class 'rng': did you mean 'ring'?"),
        (
            ["--out", "x", "--class-id", "tench"],
            "there is no class 'tench': classes are circle, square, triangle, ring",
        ),
        (["--out", "x.jpg", "--interpolate"], "--out must name a .gif, .apng, .png or .mp4 file, got x.jpg"),
    ],
)
def test_bad_sampling_options(args, message, tiny_run, tmp_path, monkeypatch, sentence):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["sample", str(tiny_run), *args]) == 2
    assert message in sentence() and list(tmp_path.iterdir()) == []


def test_old_images_are_not_mixed_with_new_ones(tiny_run, tmp_path, monkeypatch, sentence, capsys):
    out = tmp_path / "rings"
    what = ["sample", str(tiny_run), "--out", str(out), "--class-id", "ring"]
    assert cli.main([*what, "--count", "4"]) == 0
    (out / "notes.txt").write_text("mine")
    (out / "photo.png").write_text("mine too")
    first = (out / "000000_class3.png").read_bytes()
    capsys.readouterr()
    assert cli.main([*what, "--count", "2", "--seed", "1"]) == 2
    assert "rings holds 4 images of an earlier `sagan-fast sample`" in sentence() and len(list(out.iterdir())) == 6
    with monkeypatch.context() as patch:
        patch.setattr("sagan_fast.visualize.grids.save_png", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            cli.main([*what, "--count", "2", "--seed", "1", "--overwrite"])
        assert len(list(out.iterdir())) == 6  # what fails takes nothing away
    assert cli.main([*what, "--count", "2", "--seed", "1", "--overwrite"]) == 0
    left = sorted(path.name for path in out.iterdir())
    assert left == ["000000_class3.png", "000001_class3.png", "notes.txt", "photo.png"]
    assert (out / "000000_class3.png").read_bytes() != first


def test_one_image_is_one_file(tiny_run, tmp_path):
    assert cli.main(["sample", str(tiny_run), "--out", str(tmp_path / "s1.png"), "--count", "1"]) == 0
    assert Image.open(tmp_path / "s1.png").size == (32, 32)


def test_a_row_a_class_with_the_same_z_in_a_column(tiny_run, tmp_path, capsys):
    out = tmp_path / "c.png"
    args = ["--by-class", "--classes", "mirrored triangles,1-2", "--count", "4", "--seed", "5"]
    assert cli.main(["sample", str(tiny_run), "--out", str(out), *args]) == 0
    assert "3 rows of 4 images in" in capsys.readouterr().out
    y = torch.tensor([7, 1, 2]).repeat_interleave(4)
    assert same(cells(out, 3, 4), expected(tiny_run, latents(4, 128, 5).repeat(3, 1), y))


def test_a_row_a_truncation_of_the_same_draws(tiny_run, tmp_path):
    out = tmp_path / "t.png"
    args = ["--truncation", "0.2,1.0,none", "--count", "3", "--class-id", "4"]
    assert cli.main(["sample", str(tiny_run), "--out", str(out), *args]) == 0
    z = latents(3, 128, 0)
    z = torch.cat([truncated(z, 0.2), truncated(z, 1.0), z])
    assert same(cells(out, 3, 3), expected(tiny_run, z, torch.full((9,), 4)))


def test_rows_from_one_end_to_the_other(tiny_run, tmp_path):
    out, both = tmp_path / "i.png", ["--interpolate", "--count", "2", "--frames", "5", "--class-id", "4"]
    assert cli.main(["sample", str(tiny_run), "--out", str(out), *both]) == 0
    ends = cells(out, 2, 5)[[0, 4, 5, 9]]
    assert same(ends, expected(tiny_run, latents(4, 128, 0), torch.full((4,), 4)))
    assert cli.main(["sample", str(tiny_run), "--out", str(out), *both, "--to-class", "8", "--same-z"]) == 0
    ends = cells(out, 2, 5)[[0, 4, 5, 9]]
    z = latents(4, 128, 0)[[0, 0, 2, 2]]
    assert same(ends, expected(tiny_run, z, torch.tensor([4, 8, 4, 8])))
    assert cli.main(["sample", str(tiny_run), "--out", str(tmp_path / "i.gif"), *both]) == 0
    assert Image.open(tmp_path / "i.gif").n_frames == 8  # five there, three back


def test_lists_are_read():
    assert read_truncations("0.5, none,2") == [0.5, None, 2.0] and read_truncations(None) == [None]
    assert read_classes("3,0-2", 4) == [3, 0, 1, 2] and read_classes(None, 3) == [0, 1, 2]
    with pytest.raises(InputError, match="there are 1000 classes: choose some, such as --classes 0-99"):
        read_classes(None, 1000)
    with pytest.raises(InputError, match="--by-class cannot be given for a model trained without classes"):
        read_classes(None, 0)


def test_samples_in_one_npz_file_are_the_pictures(tiny_run, tmp_path):
    what = ["sample", str(tiny_run), "--count", "5", "--device", "cpu", "--out"]
    assert all(cli.main([*what, str(tmp_path / name)]) == 0 for name in ("a.npz", "pictures"))
    data = open_dataset(f"npz:{tmp_path / 'a.npz'}", resolution=None)
    names = sorted((tmp_path / "pictures").iterdir())
    assert [f"{i:06d}_class{label}.png" for i, label in enumerate(data.labels)] == [path.name for path in names]
    for (image, _), path in zip(data, names, strict=True):
        assert (image.permute(1, 2, 0).numpy() == np.asarray(Image.open(path))).all()
