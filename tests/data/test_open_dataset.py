"""Specs: each kind opens, and what is no spec is answered with the nearest one."""

import pytest

from sagan_fast.data import open_dataset
from sagan_fast.errors import InputError


def test_shapes():
    data = open_dataset("shapes", resolution=16, num_classes=10)
    assert data.name == "shapes" and len(data) == 5000 and data.resolution == 16 and data.num_broken == 0
    with pytest.raises(InputError, match="shapes is drawn with any number of pixels: --resolution R must be given"):
        open_dataset("shapes", resolution=None)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "shape",
            r"^'shape' is no data set; did you mean shapes\? "
            r"\(accepted are shapes, folder:PATH, packed:PATH, cifar10:PATH, cifar100:PATH, npz:PATH\)$",
        ),
        ("foldr:/a/b", r"'foldr:/a/b' is no data set; did you mean folder:/a/b\?"),
        ("CIFAR10:x", r"did you mean cifar10:x\?"),
        ("cifar:x", r"did you mean cifar10:x\?"),
        ("zzz", r"^'zzz' is no data set; accepted are shapes, folder:PATH, packed:PATH, \S+, \S+, npz:PATH$"),
        ("", r"^'' is no data set; accepted"),
        ("paked:/a", r"did you mean packed:/a\?"),
        ("packed:", r"'packed:' names no path; write packed:PATH"),
        ("folder", r"'folder' names no path; write folder:PATH"),
        ("cifar10:", r"'cifar10:' names no path; write cifar10:PATH"),
        ("shapes:32", r"shapes is drawn in code and takes no path"),
    ],
)
def test_wrong_specs(spec, message):
    with pytest.raises(InputError, match=message):
        open_dataset(spec, resolution=32)


def test_folder_without_its_kind(tmp_path):
    with pytest.raises(InputError, match=rf"is a folder without the kind .*; did you mean folder:{tmp_path}\?"):
        open_dataset(str(tmp_path), resolution=32)


def test_wrong_options():
    with pytest.raises(InputError, match="on_broken must be one of fail, skip, got 'ignore'"):
        open_dataset("shapes", resolution=32, on_broken="ignore")
    with pytest.raises(InputError, match="resolution of a data set must be at least 1 pixel, got 0"):
        open_dataset("folder:x", resolution=0)
