"""Writing: whole or not at all."""

import errno
import os

import pytest
import torch

from sagan_fast.errors import InputError
from sagan_fast.training.checkpoint import restore_rng, rng_state, save_atomically


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
