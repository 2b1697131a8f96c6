"""The command line as a user meets it: help, exit statuses, sentences."""

import os
import subprocess
import sys

import pytest

from sagan_fast import cli


def test_help_is_there_for_all_and_for_each(capsys):
    assert cli.main(["--help"]) == 0
    assert "generate images from a run or checkpoint" in capsys.readouterr().out
    for command in ("train", "sample", "info"):
        with pytest.raises(SystemExit) as stop:
            cli.main([command, "--help"])
        assert stop.value.code == 0
    out = capsys.readouterr().out
    for word in ("--batch_size", "--generator.base_channels", "--truncation", "--class_id", "images per step"):
        assert word in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["tran"], "unknown command 'tran': did you mean 'train'?"),
        (["train", "--out", "x"], "--preset NAME or --config FILE must be given; presets are"),
        (["train", "--preset", "shapes-31", "--out", "x"], "unknown preset 'shapes-31'"),
        (["train", "--preset", "shapes-32", "--out", "x", "--bach-size=3"], "'bach_size': did you mean 'batch_size'?"),
        (["train", "--preset", "shapes-32", "--out", "x", "--generator.z-dm=3"], "did you mean 'generator.z_dim'?"),
        (["train", "--preset", "shapes-32", "--out", "x", "--batch-size", "many"], "batch_size"),
        (["train", "--preset", "shapes-32", "--out", "x", "--batch-size", "0"], "batch_size must be at least 1, got 0"),
        (["train", "--preset", "shapes-32"], "out"),
        (["train", "--preset", "cifar-32", "--out", "x"], "data"),
        (["train", "--preset", "shapes-32", "--out", "x", "--data", "folder:/none/at/all"], "/none/at/all"),
        (["train", "--preset", "shapes-32", "--config", "c", "--out", "x"], "both whole recipes: give one"),
        (["train", "--config", "/none.yaml", "--out", "x"], "cannot read /none.yaml"),
        (["sample", "/none", "--out", "x"], "there is no run folder or checkpoint /none"),
        (["sample", "/none"], "out"),
        (["info", "--verbos"], "unknown key 'verbos'"),
    ],
)  # fmt: skip
def test_bad_input_is_a_sentence_and_status_2(args, message, tmp_path, monkeypatch, sentence):
    monkeypatch.chdir(tmp_path)
    assert cli.main(args) == 2
    assert message in sentence()
    assert list(tmp_path.iterdir()) == []


def test_the_installed_command_runs():
    command = os.path.join(os.path.dirname(sys.executable), "sagan-fast")
    done = subprocess.run([command, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("sagan-fast ")
