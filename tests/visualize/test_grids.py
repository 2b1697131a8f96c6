import numpy as np
import pytest
import torch
from PIL import Image

from sagan_fast.errors import InputError
from sagan_fast.visualize.grids import grid_by_class, labelled_grid, save_grid, save_png, to_uint8


def read(path):
    return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)


def test_pixels_are_rounded_and_clipped():
    values = torch.tensor([-1.0, 1.0, 0.0, 2.0, -3.0, 1 / 127.5 - 1]).reshape(1, 1, 1, 6).expand(1, 3, 1, 6)
    assert to_uint8(values)[0, 0, 0].tolist() == [0, 255, 128, 255, 0, 1]


def test_a_png_holds_the_pixels(tmp_path):
    image = torch.randint(256, (3, 5, 7), dtype=torch.uint8)
    save_png(image, tmp_path / "new" / "i.png")
    assert torch.equal(read(tmp_path / "new" / "i.png"), image)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["i.png"]


def test_a_grid_has_the_images_in_rows(tmp_path):
    images = torch.linspace(-1, 1, 6)[:, None, None, None].expand(6, 3, 64, 64)
    save_grid(images, tmp_path / "g.png", columns=3)
    grid = read(tmp_path / "g.png")
    assert grid.shape == (3, 2 * 66 + 2, 3 * 66 + 2)
    assert [grid[0, 2 + 66 * (i // 3), 2 + 66 * (i % 3)].item() for i in range(6)] == to_uint8(images)[
        :, 0, 0, 0
    ].tolist()
    save_grid(images[:, :, :32, :32], tmp_path / "small.png", columns=6)
    assert read(tmp_path / "small.png").shape == (3, 68, 6 * 66 + 2)


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot write"):
        save_png(torch.zeros(3, 2, 2, dtype=torch.uint8), tmp_path / "file" / "i.png")


def test_a_labelled_grid_names_its_rows():
    images = torch.linspace(-1, 0.5, 6)[:, None, None, None].expand(6, 3, 32, 32)
    picture = labelled_grid(images, ["ring", "a name that is much too long for its place"])
    row = 64 + 2
    right = picture[:, :, -(3 * row - 2 + 6) : -6]
    assert picture.shape[1] == 2 * row - 2 + 12 and picture.shape[2] <= 2 * 64 + 8 + 3 * row + 10 + 2
    assert [right[0, 6 + row * (i // 3), row * (i % 3)].item() for i in range(6)] == to_uint8(images)[
        :, 0, 0, 0
    ].tolist()
    left = picture[:, :, : -(3 * row - 2 + 6)]
    assert (left[:, 6:70].amin(0) < 100).any() and (left[:, 72:136].amin(0) < 100).any()  # ink beside both
    assert labelled_grid(images, ["", ""]).shape[2] < picture.shape[2]


def test_a_grid_names_its_classes():
    images = torch.linspace(-1, 0.5, 6)[:, None, None, None].expand(6, 3, 32, 32)
    rows = grid_by_class(images, torch.tensor([0, 0, 0, 1, 1, 1]), ["ring"], 3)
    assert torch.equal(rows, labelled_grid(images, ["ring", "class 1"]))
    mixed = grid_by_class(images[:5], torch.tensor([0, 1, 0, 1, 1]), ["ring", "cross"], 3)
    assert mixed.shape[2] == 3 * 66 + 8 and mixed.shape[1] > 2 * 66 + 20
    assert (mixed[:, 4 + 64 : 4 + 80, 4:68].amin(0) < 128).any()  # a name under the image
    assert (mixed[:, -70:, -66:] == 255).all()  # nothing where the sixth would be
    assert grid_by_class(images, None, [], 3).shape == (3, 2 * 66 + 2, 3 * 66 + 2)
