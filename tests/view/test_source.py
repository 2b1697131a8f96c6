"""A source is a run, a checkpoint or an export; what it lacks is said."""

import io

import pytest
import torch
from PIL import Image

from sagan_fast.errors import InputError
from sagan_fast.view.source import View, png

CPU = torch.device("cpu")


def test_a_checkpoint_of_a_run_shows_the_run(tiny_run):
    view = View(tiny_run / "checkpoints" / "last.pt", CPU)
    status = view.status()
    assert status["step"] == 2 and status["steps"] == 2 and status["newer"] is False
    assert [step for step, _ in status["pictures"]] == [2] and status["data"] == "/pictures/data.png"


def test_a_started_run_without_a_checkpoint_has_no_model(tmp_path):
    (tmp_path / "config.yaml").write_text("steps: 5\n")
    view = View(tmp_path, CPU)
    assert view.model is None and "no checkpoint yet" in view.missing
    assert view.status() == {"step": None, "steps": 5, "time": None, "lines": 0, "pictures": [], "data": None,
                             "scores": 0, "newer": False}  # fmt: skip


def test_what_is_no_source_is_refused(tmp_path):
    (tmp_path / "some.pt").write_bytes(b"no checkpoint")
    for path in (tmp_path, tmp_path / "none", tmp_path / "some.pt"):
        with pytest.raises(InputError):
            View(path, CPU)


def test_pictures_become_data_uris(generator):
    import base64

    image = torch.randint(256, (3, 4, 5), dtype=torch.uint8, generator=generator)
    kind, content = png(image).split(",")
    assert kind == "data:image/png;base64"
    back = Image.open(io.BytesIO(base64.b64decode(content)))
    assert back.size == (5, 4) and back.getpixel((3, 2)) == tuple(image[:, 2, 3].tolist())
