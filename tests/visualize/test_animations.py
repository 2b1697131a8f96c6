"""Every frame is there, large enough to be seen."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sagan_fast.errors import InputError
from sagan_fast.visualize.animations import check_animation, save_animation


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
        assert found.shape == (3, 17 * 20, 17 * 30)  # 510 pixels: the whole factor that comes nearest to 512
        found = found[:, 8::17, 8::17]
        assert np.abs(found - frame.numpy()).max() <= tolerance and image.info["duration"] == 100
    assert [path.name for path in (tmp_path / "new").iterdir()] == [name]


def test_an_mp4_is_decoded_to_its_frames(tmp_path):
    av = pytest.importorskip("av")
    frames = moving_dot()
    save_animation(frames, tmp_path / "a.mp4", frames_per_second=10)
    with av.open(tmp_path / "a.mp4") as container:
        stream = container.streams.video[0]
        found = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        assert stream.average_rate == 10 and stream.codec_context.pix_fmt == "yuv420p"
    assert len(found) == len(frames)
    for frame, expected in zip(found, frames, strict=True):
        assert frame.shape == (17 * 20, 17 * 30, 3)
        inside = frame[8::17, 8::17].transpose(2, 0, 1).astype(int)  # amid the enlarged pixels, away from their edges
        assert np.abs(inside - expected.numpy()).max() <= 12  # lossy, and colours of the half resolution


def test_an_odd_size_is_made_even_for_an_mp4(tmp_path):
    av = pytest.importorskip("av")
    save_animation([torch.zeros(3, 303, 401, dtype=torch.uint8)] * 2, tmp_path / "a.mp4")
    with av.open(tmp_path / "a.mp4") as container:
        (first, _) = container.decode(video=0)
    pixels = first.to_ndarray(format="rgb24")
    assert pixels.shape == (304, 402, 3) and pixels[:300, :398].max() < 12


def test_what_cannot_be_written_is_said(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="^--sweep must name a .gif, .apng, .png or .mp4 file, got x.avi$"):
        check_animation(Path("x.avi"), "sweep")
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot write"):
        save_animation(moving_dot(), tmp_path / "file" / "a.gif")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(InputError, match=r"needs the package av: pip install 'sagan_fast\[video\]'"):
        check_animation(Path("x.mp4"), "sweep")
