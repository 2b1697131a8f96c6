"""`sagan-fast prepare` from the command line: makes, checks, refuses in a sentence."""

import signal

import numpy as np
import pytest
from PIL import Image

import sagan_fast.commands.prepare as module
from sagan_fast.cli import main
from sagan_fast.data import open_dataset


@pytest.fixture
def images(tmp_path, rng):
    for name in "ab":
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(4):
            Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)).save(
                tmp_path / "images" / name / f"{i}.png"
            )
    return tmp_path / "images"


def test_prepare_train_on_it_and_check(images, tmp_path, capsys):
    out = str(tmp_path / "packed")
    assert main(["prepare", str(images), out, "--size", "8", "--num-workers", "1"]) == 0
    assert capsys.readouterr().out == f"{out}: 8 images of 8x8, 2 classes; train with --data packed:{out}\n"
    assert len(open_dataset(f"packed:{out}", resolution=8, num_classes=2)) == 8
    assert main(["prepare", "--check", out]) == 0
    assert capsys.readouterr().out == f"{out}: 8 images of 8x8, 2 classes: all right\n"
    (tmp_path / "packed" / "labels.npy").unlink()
    assert main(["prepare", out, "--check"]) == 2
    assert "labels.npy cannot be read" in capsys.readouterr().err


def test_broken_images(images, tmp_path, capsys, sentence):
    (images / "a" / "5.png").write_text("no image")
    out = tmp_path / "packed"
    what = ["prepare", str(images), str(out), "--size=8", "--num_workers=0"]
    assert main(what) == 2
    assert "5.png cannot be read" in sentence()
    assert main([*what, "--on-broken", "skip"]) == 0
    assert f"1 could not be read and were left out: {out / 'broken.txt'}" in capsys.readouterr().out


def test_a_stop_signal_ends_it_with_0_and_the_command_again_finishes(images, tmp_path, capsys, monkeypatch):
    import sagan_fast.data.prepare as work

    monkeypatch.setattr(work, "TASK_BYTES", 1)
    original = work._decode

    def interrupted(*args):
        signal.raise_signal(signal.SIGTERM)
        return original(*args)

    before = signal.getsignal(signal.SIGTERM)
    what = ["prepare", str(images), str(tmp_path / "packed"), "--size=8", "--num_workers=0"]
    with monkeypatch.context() as patch:
        patch.setattr(work, "_decode", interrupted)
        assert main(what) == 0
    assert "stopped as asked; the same command goes on" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) == before
    assert main(what) == 0 and "8 images of 8x8" in capsys.readouterr().out


def test_progress_is_a_line_now_and_then(images, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(module, "SECONDS_BETWEEN_LINES", -1.0)
    assert main(["prepare", str(images), str(tmp_path / "packed"), "--size=8", "--num_workers=0"]) == 0
    err = capsys.readouterr().err
    assert f"{tmp_path / 'packed'}: 100%, 8 images, " in err and "\x1b" not in err


def test_class_names_are_for_numbers(images, tmp_path, sentence):
    (tmp_path / "names.txt").write_text("one\ntwo\n")
    what = ["prepare", str(images), str(tmp_path / "packed"), "--size=8", "--class-names"]
    assert main([*what, str(tmp_path / "names.txt")]) == 2
    assert "has class names of its own" in sentence()
    assert main([*what, str(tmp_path / "none.txt")]) == 2
    assert "none.txt cannot be read: No such file" in sentence()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["{}"], "prepare needs SOURCE, OUT and --size"),
        (["{}", "out"], "prepare needs SOURCE, OUT and --size"),
        (["{}", "out", "--size", "0"], "size must be at least 1, got 0"),
        (["{}", "out", "--size", "8", "--num-workers", "-1"], "num_workers must be at least 0, got -1"),
        (["{}", "out", "--size", "8", "--first-label", "2"], "--first-label must be 0 or 1, got 2"),
        (["{}", "out", "--sise", "8"], "unknown key 'sise': did you mean 'size'?"),
        (["{}", "out", "--check"], "--check takes one folder"),
        (["{}/nothing", "out", "--size", "8"], "nothing does not exist"),
        (["{}", "--check"], "holds no packed set"),
    ],
)
def test_errors_are_a_sentence(images, sentence, args, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["prepare", *(arg.format(images) for arg in args)]) == 2
    assert message in sentence()
    assert not (tmp_path / "out").exists()
