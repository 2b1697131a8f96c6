import numpy as np
import pytest
import torch
from PIL import Image

from sagan_fast.errors import InputError
from sagan_fast.visualize.animation import save_animation


def moving_dot(frames=6):
    out = torch.full((frames, 3, 20, 30), 40, dtype=torch.uint8)
    for i, frame in enumerate(out):
        frame[:, 5:9, 4 * i : 4 * i + 4] = torch.tensor([255, 60, 50], dtype=torch.uint8)[:, None, None]
    return list(out)


@pytest.mark.parametrize(
    ("name", "kind", "tolerance"), [("a.gif", "GIF", 2), ("a.apng", "PNG", 0), ("a.png", "PNG", 0)]
)
def test_every_frame_is_there_with_its_colours(name, kind, tolerance, tmp_path):
    frames = moving_dot()
    save_animation(frames, tmp_path / "new" / name, frames_per_second=10)
    image = Image.open(tmp_path / "new" / name)
    assert image.format == kind and image.n_frames == 6 and image.info["loop"] == 0
    for i, frame in enumerate(frames):
        image.seek(i)
        found = np.array(image.convert("RGB")).transpose(2, 0, 1).astype(int)
        assert np.abs(found - frame.numpy()).max() <= tolerance and image.info["duration"] == 100
    assert [path.name for path in (tmp_path / "new").iterdir()] == [name]


def test_what_cannot_be_written_is_said(tmp_path):
    with pytest.raises(InputError, match="an animation must be a .gif, .apng, .png file, got x.mp4"):
        save_animation(moving_dot(), tmp_path.with_name("x.mp4").relative_to(tmp_path.parent))
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot write"):
        save_animation(moving_dot(), tmp_path / "file" / "a.gif")
