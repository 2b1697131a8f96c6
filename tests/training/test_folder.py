"""Writing: whole or not at all."""

import errno
import json
import os
import resource
import signal
import stat

import pytest
import torch

from sagan_fast.errors import InputError
from sagan_fast.training import folder
from sagan_fast.training.config import TrainConfig, read_yaml
from sagan_fast.training.folder import Checkpoints, RunFolder, restore_rng, rng_state, save_atomically

CONFIG = TrainConfig.from_preset("shapes-32", out="x")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "checkpoints" / "last.pt"
    save_atomically({"step": 1}, path)

    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(InputError, match=r"cannot write the checkpoint .*last.pt: No space left on device"):
        save_atomically({"step": 2}, path)
    monkeypatch.undo()
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert [p.name for p in path.parent.iterdir()] == ["last.pt"]


def test_a_crash_before_the_rename_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    save_atomically({"step": 1}, path)
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        save_atomically({"step": 2}, path)
    assert torch.load(path, weights_only=True) == {"step": 1}


def test_a_place_that_is_no_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot write the checkpoint"):
        save_atomically({}, tmp_path / "file" / "last.pt")


def test_random_numbers_go_on_where_they_were():
    state = rng_state()
    expected = torch.rand(5)
    torch.manual_seed(99)
    restore_rng(state)
    assert torch.equal(torch.rand(5), expected)


def names(checkpoints):
    return sorted(path.name for path in checkpoints.folder.iterdir())


def test_the_newest_few_stay_and_last_is_the_newest(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (5, 10, 15):
        assert checkpoints.save({"step": step}, step) == tmp_path / "last.pt"
        assert torch.load(tmp_path / "last.pt", weights_only=True) == {"step": step}
    assert checkpoints.steps() == [10, 15] and names(checkpoints) == ["last.pt", "step-00000010.pt", "step-00000015.pt"]
    assert os.stat(tmp_path / "last.pt").st_ino == os.stat(checkpoints.path(15)).st_ino
    assert [checkpoints.before(step) for step in (99, 15, 14, 3)] == [checkpoints.path(s) for s in (15, 15, 10, 10)]
    checkpoints.drop_after(10)
    assert checkpoints.steps() == [10] and torch.load(tmp_path / "last.pt", weights_only=True) == {"step": 10}
    assert Checkpoints(tmp_path / "none", 2).before(1) is None


def test_without_links_there_are_copies(tmp_path, monkeypatch):
    def refused(*_):
        raise PermissionError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refused)
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save({"step": 5}, 5)
    assert torch.load(tmp_path / "last.pt", weights_only=True) == {"step": 5}
    assert names(checkpoints) == ["last.pt", "step-00000005.pt"]


def test_the_best_is_kept_when_its_time_has_passed(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    best = tmp_path / "best.pt"
    for step, score, expected in ((1, 30.0, True), (2, 20.0, True), (3, 25.0, False), (4, float("nan"), False)):
        checkpoints.save({"step": step}, step)
        assert checkpoints.pin_best(step, "fid", score) is expected
    assert torch.load(best, weights_only=True) == {"step": 2}
    assert json.loads((tmp_path / "best.json").read_text()) == {"step": 2, "metric": "fid", "score": 20.0}
    assert checkpoints.pin_best(4, "kid", 5.0)
    assert not checkpoints.pin_best(4, "kid", 6.0)
    (tmp_path / "best.json").write_text("{")
    assert checkpoints.pin_best(4, "kid", 9.0)
    with pytest.raises(InputError, match="there is no checkpoint .*step-00000002.pt to keep as the best"):
        checkpoints.pin_best(2, "fid", 1.0)


def test_a_disk_that_fills_up_in_the_midst_leaves_the_last_checkpoint(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save({"weights": torch.ones(100)}, 1)
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
    try:
        with pytest.raises(InputError, match="cannot write the checkpoint .*; the one before it is untouched"):
            checkpoints.save({"weights": torch.ones(1_000_000)}, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert names(checkpoints) == ["last.pt", "step-00000001.pt"]
    assert torch.equal(torch.load(tmp_path / "last.pt", weights_only=True)["weights"], torch.ones(100))


def test_a_folder_is_made_with_its_config_and_leftovers_go(tmp_path):
    run = RunFolder(tmp_path / "a" / "run", 3)
    run.check(resume=False)
    run.open(CONFIG)
    assert {p.name for p in run.path.iterdir()} == {".lock", "config.yaml", "samples", "checkpoints"}
    assert read_yaml(run.path / "config.yaml")["steps"] == 600
    run.close()
    (run.checkpoints.folder / ".step-00000002.pt.abc.part").write_text("half")
    run.open(CONFIG)
    assert list(run.checkpoints.folder.iterdir()) == []
    run.close()
    run.check(resume=False)  # it ended before its first checkpoint
    run.checkpoints.save({"step": 2}, 2)
    (run.path / "config.yaml").unlink()
    with pytest.raises(InputError, match="already holds a run: add --resume"):
        run.check(resume=False)
    run.check(resume=True)


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "run").write_text("x")
    with pytest.raises(InputError, match="is a file: --out must name a folder"):
        RunFolder(tmp_path / "run", 3).check(resume=True)


def test_two_runs_do_not_share_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "PATIENCE", 0.3)
    first, second = (RunFolder(tmp_path / "run", 3) for _ in range(2))
    first.open(CONFIG)
    with pytest.raises(InputError, match="another process is training in .*run: end it first"):
        second.open(CONFIG)
    first.close()
    second.open(CONFIG)
    second.close()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_a_sentence(tmp_path):
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(InputError, match="cannot write .*config.yaml: Permission denied"):
        RunFolder(tmp_path / "run", 3).open(CONFIG)


def test_a_place_where_no_folder_can_be_is_a_sentence(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot write .*config.yaml: Not a directory"):
        RunFolder(tmp_path / "file" / "run", 3).open(CONFIG)


def test_a_checkpoint_is_chosen_by_step_or_name(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=5)
    for step in (1, 2, 3):
        checkpoints.save({"step": step}, step)
    with pytest.raises(
        InputError, match=r"there is no checkpoint .*step-00000007\.pt: .* holds those of the steps 1, 2, 3"
    ):
        checkpoints.chosen("7")
    assert checkpoints.chosen("2") == checkpoints.path(2) and checkpoints.chosen("newest") == checkpoints.last


def test_what_is_later_is_set_aside_every_time(tmp_path):
    run = RunFolder(tmp_path, 5)
    for name in ("checkpoints", "samples", "evaluation"):
        (tmp_path / name).mkdir()
    for future in range(3):
        for step in (1, 2, 3):
            save_atomically({"step": step, "future": future}, run.checkpoints.path(step))
            (tmp_path / "samples" / f"{step:07d}.png").write_text(f"{future}")
            (tmp_path / "evaluation" / f"step-{step:08d}.json").write_text(f"{future}")
        assert run.checkpoints.pin_best(3, "fid", 100.0 - future) is True
        aside, names = run.set_aside(run.checkpoints.chosen("1"), 1)
        assert aside == tmp_path / "replaced" / str(future + 1) and len(names) == 8
        assert run.checkpoints.steps() == [1] and not (tmp_path / "checkpoints" / "best.json").exists()
        assert torch.load(run.checkpoints.last, weights_only=True)["step"] == 1
    for future in range(3):
        kept = tmp_path / "replaced" / str(future + 1)
        assert torch.load(kept / "checkpoints" / "step-00000003.pt", weights_only=True)["future"] == future
        assert json.loads((kept / "checkpoints" / "best.json").read_text())["score"] == 100.0 - future
        assert (kept / "samples" / "0000002.png").read_text() == f"{future}"
    assert run.set_aside(run.checkpoints.chosen("1"), 1) == (tmp_path / "replaced" / "4", [])
    assert not (tmp_path / "replaced" / "4").exists()
