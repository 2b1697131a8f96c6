"""A dry run says what the run will be like, and writes nothing."""

import shutil

import pytest

from sagan_fast import cli
from sagan_fast.errors import InputError
from sagan_fast.training import rehearsal
from sagan_fast.training.rehearsal import check_place

TINY = ["train", "--preset", "shapes-32", "--generator.base-channels=4", "--discriminator.base-channels=4",
        "--batch-size=8", "--device=cpu", "--dry-run", "--steps=1250"]  # fmt: skip


def test_a_dry_run_says_what_the_run_will_be_like(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main([*TINY, "--cuda-graph=true", "--out", "runs/a"]) == 0
    said = capsys.readouterr().out
    for part in ("data          5000 images of shapes, 10 classes", "625.0 steps of 8 images an epoch; 1250 steps: 2.0",
                 "generator     ", " parameters", "attention     G: attentions.16: eager (8 maps of 256 x 64 are small",
                 "attention     D: attentions.16: eager", "memory        ", "speed         ", " s a step, ",
                 "cuda graph    none: the run is on cpu",
                 "end           1250 steps in ", "nothing was written: leave out --dry-run to start"):  # fmt: skip
        assert part in said, part
    assert list(tmp_path.iterdir()) == []


def test_what_would_stop_the_run_stops_the_dry_run(tiny_run, tmp_path, sentence, monkeypatch):
    assert cli.main([*TINY, "--out", str(tiny_run)]) == 2
    assert "already holds a run: add --resume" in sentence()
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="file is a file: --out must name a folder"):
        check_place(tmp_path / "file" / "run", 0.1)
    free = shutil.disk_usage(tmp_path)._replace(free=2e9)
    monkeypatch.setattr(rehearsal.shutil, "disk_usage", lambda path: free)
    with pytest.raises(InputError, match=r"has 2\.0 GB free, and the checkpoints need 3\.0 GB"):
        check_place(tmp_path / "run", 3.0)
    check_place(tmp_path / "run", 1.0)
