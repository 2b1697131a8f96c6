"""The command line as a user meets it: exit statuses, sentences, files."""

import os
import subprocess
import sys

import pytest
import torch
import yaml

from sagan_fast import cli

TINY = ["--generator.base_channels=4", "--discriminator.base_channels=4", "--batch-size", "4", "--device", "cpu"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two steps."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    assert (
        cli.main(["train", "--preset", "shapes-32", "--data", "shapes", "--out", str(folder), "--steps", "2", *TINY])
        == 0
    )
    return folder


def sentence(capsys):
    err = capsys.readouterr().err
    assert err.startswith("sagan-fast: ") and err.count("\n") == 1 and "Traceback" not in err
    return err


def test_help_is_there_for_all_and_for_each(capsys):
    assert cli.main(["--help"]) == 0
    assert "draw images from a run or checkpoint" in capsys.readouterr().out
    for command in ("train", "sample", "info"):
        with pytest.raises(SystemExit) as stop:
            cli.main([command, "--help"])
        assert stop.value.code == 0
    out = capsys.readouterr().out
    for word in ("--batch_size", "--generator.base_channels", "--truncation", "--class_id", "images a step"):
        assert word in out


def test_train_writes_the_run_folder(run):
    names = {p.name for p in run.iterdir()}
    assert names == {"config.yaml", "log.jsonl", "samples", "checkpoints", "tensorboard"}


def test_resume_needs_no_more_than_the_folder(run):
    assert cli.main(["train", "--resume", "--out", str(run), "--steps", "3"]) == 0
    assert torch.load(run / "checkpoints" / "last.pt", weights_only=True)["step"] == 3


def test_a_second_run_in_the_same_folder_is_refused(run, capsys):
    before = (run / "config.yaml").read_bytes()
    assert cli.main(["train", "--config", str(run / "config.yaml")]) == 2
    assert "already holds a run: add --resume" in sentence(capsys)
    assert (run / "config.yaml").read_bytes() == before


def test_print_config_is_a_config(tmp_path, capsys):
    args = ["train", "--preset", "shapes-32", "--generator.attention-resolutions=[8,16]", "--seed=7", "--print-config"]
    assert cli.main(args) == 0
    printed = capsys.readouterr().out
    (tmp_path / "c.yaml").write_text(printed)
    assert yaml.safe_load(printed)["generator"]["attention_resolutions"] == [8, 16]
    assert cli.main(["train", "--config", str(tmp_path / "c.yaml"), "--print-config"]) == 0
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["tran"], "unknown command 'tran': did you mean 'train'?"),
        (["train", "--out", "x"], "--preset NAME or --config FILE must be given; presets are"),
        (["train", "--preset", "shapes-31", "--out", "x"], "unknown preset 'shapes-31'"),
        (["train", "--preset", "shapes-32", "--out", "x", "--bach-size=3"], "'bach_size': did you mean 'batch_size'?"),
        (["train", "--preset", "shapes-32", "--out", "x", "--generator.z-dm=3"], "did you mean 'generator.z_dim'?"),
        (["train", "--preset", "shapes-32", "--out", "x", "--batch-size", "many"], "batch_size"),
        (["train", "--preset", "shapes-32", "--out", "x", "--batch-size", "0"], "batch_size must be positive, got 0"),
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
def test_bad_input_is_a_sentence_and_status_2(args, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(args) == 2
    assert message in sentence(capsys)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_key_in_a_file_names_the_nearest(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("data: shapes\nout: x\ngenerator: {base_chanels: 4}\n")
    assert cli.main(["train", "--config", str(tmp_path / "c.yaml")]) == 2
    assert "unknown key 'generator.base_chanels': did you mean 'generator.base_channels'?" in sentence(capsys)


def test_sample_writes_a_grid_or_single_images(run, tmp_path, capsys):
    assert cli.main(["sample", str(run), "--out", str(tmp_path / "g.png"), "--count", "12", "--grid"]) == 0
    assert (tmp_path / "g.png").stat().st_size > 1000
    one = ["sample", str(run / "checkpoints" / "last.pt"), "--count", "3", "--class-id", "7", "--truncation", "0.5"]
    for folder in ("a", "b"):
        assert cli.main([*one, "--out", str(tmp_path / folder), "--seed", "5"]) == 0
    names = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert names == ["000000_class7.png", "000001_class7.png", "000002_class7.png"]
    assert all((tmp_path / "a" / n).read_bytes() == (tmp_path / "b" / n).read_bytes() for n in names)
    assert "3 images in" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--out", "x.png", "--class-id", "10", "--grid"], "class-id must be 0 to 9, got 10"),
        (["--out", "x.png", "--count", "0", "--grid"], "count must be positive, got 0"),
        (["--out", "x.png", "--truncation", "-1", "--grid"], "truncation must be positive, got -1.0"),
        (["--out", "x.jpg", "--grid"], "must name a .png file with --grid, got x.jpg"),
    ],
)
def test_bad_sampling_options(args, message, run, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["sample", str(run), *args]) == 2
    assert message in sentence(capsys) and list(tmp_path.iterdir()) == []


def test_info_says_versions_device_and_why(capsys):
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    assert torch.__version__.split("+")[0] in out and "device" in out
    assert "64x64, 128 channels, pooled: " in out and "maps of 4096 x 1024" in out


def test_a_diverged_run_is_status_1_and_a_sentence(tmp_path, capsys, monkeypatch):
    import sagan_fast.training.loop as loop

    original = loop.train_step
    monkeypatch.setattr(loop, "train_step", lambda *args: {k: v * float("nan") for k, v in original(*args).items()})
    args = ["train", "--preset", "shapes-32", "--out", str(tmp_path / "run"), "--steps", "2", *TINY]
    assert cli.main(args) == 1
    assert "is nan at step 2; stopped, with the state in" in sentence(capsys)


def test_the_installed_command_runs():
    command = os.path.join(os.path.dirname(sys.executable), "sagan-fast")
    done = subprocess.run([command, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("sagan-fast ")
