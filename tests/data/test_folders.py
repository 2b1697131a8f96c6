"""Folders as people have them: every layout that is read, and a sentence for every one that is not."""

import os
import pickle
import sys

import pytest
import torch
from PIL import Image, features

from sagan_fast.data import open_dataset
from sagan_fast.data.listing import said_passed_over
from sagan_fast.errors import InputError


def make(root, *names):
    """Write small images of random colours, by their paths below `root`; a name that ends in / is a folder."""
    for name in names:
        path = root / name
        if name.endswith("/"):
            path.mkdir(parents=True)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        colour = tuple(torch.randint(256, (3,)).tolist())
        kind = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".webp": "WEBP"}[path.suffix.lower()]
        Image.new("RGB", (12, 10), colour).save(path, kind)


def open_folder(path, **options):
    return open_dataset(f"folder:{path}", resolution=8, **options)


def files(data):
    return [os.path.relpath(data.path_of(i), data.root) for i in range(len(data))]


def test_class_folders_in_sorted_order(tmp_path):
    make(tmp_path, "dog/b.PNG", "dog/a.jpg", "cat/z.JPEG", "cat/y.webp", "bird/x.JPG")
    data = open_folder(tmp_path, num_classes=3)
    assert data.class_names == ["bird", "cat", "dog"] and data.num_classes == 3 and data.name == f"folder:{tmp_path}"
    assert files(data) == ["bird/x.JPG", "cat/y.webp", "cat/z.JPEG", "dog/a.jpg", "dog/b.PNG"]
    assert [data[i][1] for i in range(5)] == [0, 1, 1, 2, 2]
    image, label = data[4]
    assert image.dtype == torch.uint8 and image.shape == (3, 8, 8) and isinstance(label, int)
    assert image[:, 4, 4].tolist() == list(Image.open(tmp_path / "dog/b.PNG").getpixel((0, 0)))


def test_class_folders_for_an_unconditional_model(tmp_path):
    make(tmp_path, "a/1.png", "b/2.png", "c/")
    data = open_folder(tmp_path, num_classes=0)
    assert data.num_classes == 0 and data.class_names == [] and [data[i][1] for i in range(2)] == [0, 0]


@pytest.mark.parametrize("num_classes", [0, None])
def test_flat_folder(tmp_path, num_classes):
    make(tmp_path, "2.png", "10.png", "empty/")
    data = open_folder(tmp_path, num_classes=num_classes)
    assert files(data) == ["10.png", "2.png"] and data.num_classes == 0 and data[1][1] == 0


def test_what_is_no_image_is_left_out_and_counted_by_kind(tmp_path):
    make(tmp_path, "a/1.png", "b/2.png", "__MACOSX/a/._1.png", "a/.hidden.png", ".cache/x.png")
    make(tmp_path, "b/@eaDir/2.png/SYNOFILE_THUMB_M.jpg", "b/@eaDir/2.png/SYNOFILE_THUMB_S.jpg")
    for name in ["a/Thumbs.db", "readme.txt", "b/list.csv", "b/photo.HEIC", "b/photo2.heic", "a/LICENSE"]:
        (tmp_path / name).write_text("no image")
    data = open_folder(tmp_path)
    assert files(data) == ["a/1.png", "b/2.png"]
    assert data.passed_over == {
        "__MACOSX": 1, "@eaDir": 2, "hidden": 2, ".db": 1, ".txt": 1, ".csv": 1, ".heic": 2, "no extension": 1,
    }  # fmt: skip
    said = said_passed_over(data.passed_over)
    assert said == "2 .heic, 2 @eaDir, 2 hidden, 1 .csv, 1 .db, 1 .txt, 1 __MACOSX, 1 no extension"
    (tmp_path / "c").mkdir()
    assert open_folder(tmp_path, num_classes=0).passed_over["empty folder"] == 1


def test_every_still_image_that_pillow_reads_is_read(tmp_path):
    kinds = ["bmp", "tif", "tiff", "ppm", "gif", "jfif", *(["avif"] if features.check("avif") else [])]
    (tmp_path / "a").mkdir()
    image = Image.new("RGB", (8, 8), (200, 30, 60))
    for kind in kinds:
        image.save(tmp_path / "a" / f"1.{kind}", "JPEG" if kind == "jfif" else None)
    image.save(tmp_path / "a" / "2.gif", save_all=True, append_images=[Image.new("RGB", (8, 8), "blue")])
    data = open_folder(tmp_path)
    assert len(data) == len(kinds) + 1 and not data.passed_over
    for pixels, _ in data:
        assert (pixels[:, 4, 4].int() - torch.tensor([200, 30, 60])).abs().max() < 8


def test_folders_named_by_numbers_are_in_the_order_of_the_numbers(tmp_path):
    make(tmp_path, *(f"{label}/1.png" for label in range(12)))
    data = open_folder(tmp_path)
    assert data.class_names == [str(label) for label in range(12)]
    assert files(data)[10] == "10/1.png" and data[10][1] == 10


def test_deeper_images_belong_to_their_class(tmp_path):
    make(tmp_path, "a/1.png", "a/more/2.png", "b/3.png")
    assert [open_folder(tmp_path)[i][1] for i in range(3)] == [0, 0, 1]


def test_one_inner_folder_in_every_class(tmp_path):
    make(tmp_path, "n01/images/1.png", "n02/images/2.png")  # the original tiny-imagenet-200
    data = open_folder(tmp_path)
    assert data.class_names == ["n01", "n02"] and files(data) == ["n01/images/1.png", "n02/images/2.png"]


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights on Windows")
def test_links_are_followed_and_loops_are_not(tmp_path):
    make(tmp_path / "far", "1.png")
    make(tmp_path / "set", "b/2.png")
    (tmp_path / "set/a").symlink_to(tmp_path / "far")
    (tmp_path / "set/b/up").symlink_to(tmp_path / "set")
    data = open_folder(tmp_path / "set")
    assert data.class_names == ["a", "b"] and files(data) == ["a/1.png", "b/2.png"] and data[0][0].shape == (3, 8, 8)


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    make(tmp_path, "a/1.png")
    assert open_folder("~").class_names == ["a"]


def test_it_can_be_sent_to_a_spawned_worker(tmp_path):
    make(tmp_path, "a/ä ö.png", "b/2.png")
    data = open_folder(tmp_path)
    copy = pickle.loads(pickle.dumps(data))
    assert files(copy) == ["a/ä ö.png", "b/2.png"] and torch.equal(copy[0][0], data[0][0])


def test_listing_opens_no_file(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/1.png").write_text("no image")
    assert len(open_folder(tmp_path)) == 1


@pytest.mark.parametrize(
    ("names", "below", "options", "message"),
    [
        (["a/1.png"], "b", {}, r"folder:.*b does not exist: check the path"),
        (["a/1.png"], "a/1.png", {}, r"1\.png is a file: give the folder that holds the images"),
        (["a/b/"], "", {}, r"holds no images: neither in it nor below it are JPEG, PNG, WebP or .* reads$"),
        (["1.png", "cat/2.png", "dog/3.png"], "", {}, r"holds both images \(1\.png, .*folders of images \(cat, dog\)"),
        (["train/a/1.png", "train/b/2.png", "val/a/3.png"], "", {},
         r"a level too high: its folders \(train, val\) are parts of a data set, not classes; give folder:\S+train$"),
        (["Train/1.png", "Val/2.png"], "", {}, r"its folders \(Train, Val\) are parts .*; give folder:\S+Train$"),
        (["set/train/a/1.png", "set/train/b/2.png", "set/val/a/3.png", "set/val/b/4.png"], "", {},
         r"too high: its folder set holds no images but 2 folders \(train, val\); give folder:\S+set.train$"),
        (["set/a/1.png", "set/b/2.png", "set/c/2.png", "extra/3.png"], "", {},
         r"its folder set holds no images but 3 folders \(a, b, c\); give folder:\S+set$"),
        (["a/1.png", "b/2.png"], "a", {"num_classes": 2},
         r"a flat folder of 1 image, but the model has 2 classes: it seems to be one class of folder:\S+, a level too"),
        (["x/1.png"], "x", {"num_classes": 2}, r"has 2 classes: give a folder with one sub-folder .*`num_classes: 0`"),
        (["a/1.png", "b/", "c/2.png"], "", {}, r"1 of its 3 class folders \(b\) has no JPEG, PNG, WebP or other"),
        (["a/1.png", "b/", "c/x/"], "", {}, r"2 of its 3 class folders \(b, c\) have no JPEG"),
        (["a/1.png", "b/2.png"], "", {"num_classes": 1000},
         r"has 2 classes \(a, b\), but the model is made for 1000: .*`--num-classes 2`, which"),
        (["images/1.png"], "", {"num_classes": 10}, r"a flat folder of 1 image, but the model has 10 classes: give"),
    ],
)  # fmt: skip
def test_wrong_layouts(tmp_path, names, below, options, message):
    make(tmp_path / "root", *names)
    with pytest.raises(InputError, match=message) as caught:
        open_folder(tmp_path / "root" / below if below else tmp_path / "root", **options)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="root may read everything")
def test_folder_that_may_not_be_listed(tmp_path):
    make(tmp_path, "a/1.png", "b/2.png")
    (tmp_path / "a").chmod(0)
    with pytest.raises(InputError, match="a cannot be listed: Permission denied"):
        open_folder(tmp_path)
    (tmp_path / "a").chmod(0o700)


def test_broken_image_is_named(tmp_path):
    make(tmp_path, "a/1.png", "a/2.png")
    (tmp_path / "a/1.png").write_text("no image")
    data = open_folder(tmp_path)
    said = r"a.1\.png cannot be read: it is not an image that Pillow can read; on_broken=skip leaves such images out$"
    with pytest.raises(InputError, match=said):
        data[0]
    assert data[1][0].shape == (3, 8, 8)


def test_dangling_link_is_a_broken_image(tmp_path):
    make(tmp_path, "a/1.png")
    (tmp_path / "a/2.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(InputError, match=r"a.2\.png cannot be read: No such file"):
        open_folder(tmp_path)[1]


def test_million_paths_take_little_memory(tmp_path):
    names = [f"{i:04}.JPEG" for i in range(500)]
    for name in names:
        (tmp_path / name).touch()
    data = open_folder(tmp_path)
    assert [data.path_of(i) for i in range(500)] == [str(tmp_path / name) for name in names]
    assert len(pickle.dumps(data)) < 500 * (len(names[0]) + 8) + 2000  # a path and a label an image


def test_images_as_they_are(tmp_path, caplog):
    for name in ("a/1.png", "a/2.png", "b/3.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (20, 20)).save(tmp_path / name)
    (tmp_path / "a" / "0.png").write_bytes(b"broken")
    data = open_dataset(f"folder:{tmp_path}", resolution=None)
    assert data.resolution == 20 and data[1][0].shape == (3, 20, 20)
    with pytest.raises(InputError, match=r"0\.png cannot be read: it is not an image"):
        data[0]
    Image.new("RGB", (24, 20)).save(tmp_path / "b" / "3.png")
    with pytest.raises(InputError, match=r"3\.png has 24x20 pixels where 20x20 are expected: give --resolution R"):
        data[3]
    assert open_dataset(f"folder:{tmp_path}", resolution=20)[3][0].shape == (3, 20, 20)
    Image.new("RGB", (24, 20)).save(tmp_path / "a" / "0.png")
    with pytest.raises(InputError, match=r"0\.png has 24x20 pixels and is not square: give --resolution R"):
        open_dataset(f"folder:{tmp_path}", resolution=None)
    for path in tmp_path.glob("*/*.png"):
        path.write_bytes(b"broken")
    with pytest.raises(InputError, match=r"holds no image that Pillow can read, .*0\.png for one"):
        open_dataset(f"folder:{tmp_path}", resolution=None)


def test_a_fingerprint_follows_names_sizes_and_times(tmp_path):
    make(tmp_path, "a/1.png", "b/2.png")
    before = open_folder(tmp_path).fingerprint()
    assert open_folder(tmp_path).fingerprint() == before != open_folder(tmp_path, num_classes=0).fingerprint()
    os.utime(tmp_path / "a/1.png", (1, 1))
    assert (touched := open_folder(tmp_path).fingerprint()) != before
    (tmp_path / "a/1.png").rename(tmp_path / "a/0.png")
    assert open_folder(tmp_path).fingerprint() not in (before, touched)
    data = open_folder(tmp_path)
    (tmp_path / "a/0.png").unlink()
    with pytest.raises(InputError, match=r"0\.png cannot be read: No such file"):
        data.fingerprint()
