"""Where tar shards have their labels, and what of them is passed over."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from sagan_fast.data import open_dataset
from sagan_fast.data.prepare import prepare
from sagan_fast.data.sources import open_source
from sagan_fast.errors import InputError


def picture(value=0):
    data = io.BytesIO()
    Image.new("L", (4, 4), value).save(data, "PNG")
    return data.getvalue()


def write(path, *members, mode="w"):
    """Write members: (name, bytes), or (name, kind, target) of a link."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, data, *target in members:
            info = tarfile.TarInfo(name)
            if target:
                info.type, info.linkname = data, *target
                tar.addfile(info)
            else:
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def labels(path, out, **options):
    """The class name of each packed image by its gray value."""
    source = open_source(str(path), **options)
    manifest = prepare(source, out, resolution=4, num_workers=0)
    data = open_dataset(f"packed:{out}", resolution=4)
    names = data.class_names or ["-"]
    assert manifest.source["passed_over"] == dict(source.passed_over)
    return {int(image[0, 0, 0]): names[label] for image, label in data}


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_labels_after_all_images(tmp_path, mode):
    images = [(f"{i}.png", picture(i)) for i in range(4)]
    path = write(tmp_path / "a.tar", *images, *((f"{i}.cls", b"%d" % (3 - i)) for i in range(4)), mode=mode)
    assert labels(path, tmp_path / "out") == {0: "3", 1: "2", 2: "1", 3: "0"}


@pytest.mark.parametrize(
    ("ending", "form"),
    [
        ("class", b"%d"), ("index", b"%d"), ("label", b"%d\n"), ("label.cls", b"%d"), ("output.cls", b"%d.0"),
        ("json", b'{"label": %d.0}'), ("json", b'{"label": [%d]}'), ("meta.json", b'{"class_id": %d, "width": 9}'),
        ("json", b'{"class": "%d"}'),
    ],
)  # fmt: skip
def test_names_and_forms_of_labels(tmp_path, ending, form):
    samples = [(f"{i}.{end}", data) for i in range(3) for end, data in (("png", picture(i)), (ending, form % (2 - i)))]
    assert labels(write(tmp_path / "a.tar", *samples), tmp_path / "out") == {0: "2", 1: "1", 2: "0"}


def test_one_hot_in_json_and_the_preferred_of_several(tmp_path):
    samples, several = [], []
    for i in range(3):
        vector = json.dumps({"label": np.eye(3)[2 - i].tolist()}).encode()
        samples += [(f"{i}.png", picture(i)), (f"{i}.json", vector)]
        several += [*samples[-2:], (f"{i}.cls", b"%d" % i), (f"{i}.index", b"9")]
    assert labels(write(tmp_path / "a.tar", *samples), tmp_path / "out") == {0: "2", 1: "1", 2: "0"}
    assert labels(write(tmp_path / "b.tar", *several), tmp_path / "preferred") == {0: "0", 1: "1", 2: "2"}


def test_labels_that_are_none_are_refused_before_the_work(tmp_path):
    path = write(tmp_path / "a.tar", ("0.png", picture()), ("0.cls", b"0"), ("1.png", picture()), ("1.cls", b"1_0"))
    with pytest.raises(InputError, match=r"a\.tar/1\.png cannot be read: its label '1_0' is not a whole number"):
        labels(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("names", [("n01440764", "n01443537"), ("cat", "dog")])
def test_one_class_per_tar(tmp_path, names):
    for value, name in enumerate(names):
        write(tmp_path / "in" / f"{name}.tar", (f"{name}_1.JPEG", picture(value)))
    assert labels(tmp_path / "in", tmp_path / "out") == dict(enumerate(names))


def test_the_tar_of_tars_of_imagenet(tmp_path):
    inner = [
        (f"{name}.tar", write(tmp_path / name, (f"{name}_1.JPEG", picture(value))).read_bytes())
        for value, name in enumerate(("n01443537", "n01440764"))
    ]
    path = write(tmp_path / "ILSVRC2012_img_train.tar", *inner)
    assert labels(path, tmp_path / "out") == {0: "n01443537", 1: "n01440764"}
    assert open_source(str(path)).class_names == ["n01440764", "n01443537"]


def test_numbered_shards_are_no_classes(tmp_path):
    for i in range(2):
        write(tmp_path / "in" / f"set-{i:04}.tar", (f"{i}.png", picture(i)))
    assert labels(tmp_path / "in", tmp_path / "out") == {0: "-", 1: "-"}


@pytest.mark.parametrize("ending", ["txt", "id", "labels.npy", "caption.json"])
def test_what_looks_like_a_label_is_not_passed_over(tmp_path, ending):
    path = write(tmp_path / "a.tar", ("1.png", picture()), (f"1.{ending}", b'{"category": "cat"}'))
    with pytest.raises(InputError, match=rf"no labels that are read .*1 \.{ending} may be labels: .*--unlabelled true"):
        open_source(str(path))
    assert labels(path, tmp_path / "out", unlabelled=True) == {0: "-"}


def test_links_are_resolved_or_broken_and_everything_else_is_counted(tmp_path):
    path = write(
        tmp_path / "a.tar", ("d", tarfile.DIRTYPE, ""), ("1.png", picture(1)), ("1.cls", b"0"),
        ("2.png", tarfile.LNKTYPE, "1.png"), ("2.cls", tarfile.SYMTYPE, "1.cls"),
        ("3.png", tarfile.SYMTYPE, "gone.png"), ("3.cls", b"0"), ("._1.png", b"x"), ("4.heic", b"x"), ("README", b"x"),
        ("5.cls", b"0"),
    )  # fmt: skip
    source = open_source(str(path))
    assert source.passed_over == {
        "folder": 1, "hidden": 1, ".heic": 1, "no extension": 1, "label without an image": 1,
    }  # fmt: skip
    with pytest.raises(InputError, match=r"3\.png cannot be read: it links to gone\.png, not in there"):
        prepare(source, tmp_path / "out", resolution=4, num_workers=0)
    manifest = prepare(source, tmp_path / "out", resolution=4, num_workers=0, on_broken="skip")
    assert manifest.num_images == 2 and manifest.num_broken == 1
    images = open_dataset(f"packed:{tmp_path / 'out'}", resolution=4)
    assert (images[0][0] == images[1][0]).all() and images[0][0].max() == 1


def test_two_tar_files_in_a_row(tmp_path):
    one, two = (
        write(tmp_path / f"{i}", (f"{i}.png", picture(i)), (f"{i}.cls", b"%d" % i)).read_bytes() for i in range(2)
    )
    (tmp_path / "a.tar").write_bytes(one + two)
    assert labels(tmp_path / "a.tar", tmp_path / "out") == {0: "0", 1: "1"}


@pytest.mark.parametrize(
    "names",
    [
        ("imagenet-train-000000.tar", "imagenet-val-000000.tar"),
        ("train-00000-of-00002", "train-00001-of-00002", "validation-00000-of-00001"),
        ("cifar10-train.tfrecord-00000-of-00001", "cifar10-test.tfrecord-00000-of-00001"),
    ],
)
def test_parts_for_training_and_validation_are_not_packed_together(tmp_path, names):
    for name in names:
        write(tmp_path / "in" / name, ("1.png", picture()), ("1.cls", b"0"))
    with pytest.raises(
        InputError, match=r"holds several parts of a data set \(.*\): give one, as in \"(.*)\"; a list"
    ) as e:
        open_source(str(tmp_path / "in"), kind="tar")
    pattern = str(e.value).split('"')[1]
    assert all("train" in file for file in open_source(pattern, kind="tar").files)
    with pytest.raises(InputError, match="several parts"):
        open_source(f"{tmp_path}/in/*", kind="tar")
    both = open_source(f"{tmp_path}/in/{{{names[0]},{names[-1]}}}", kind="tar")
    assert len(both.files) == 2
