import os
import stat

import pytest

from sagan_fast.errors import InputError
from sagan_fast.training import folder
from sagan_fast.training.config import TrainConfig, read_yaml
from sagan_fast.training.folder import RunFolder

CONFIG = TrainConfig.from_preset("shapes-32", out="x")


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
