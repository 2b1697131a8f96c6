"""What `sagan-fast train` reads, writes and refuses."""

import shutil

import pytest
import torch
import yaml

from sagan_fast import cli


def test_train_writes_the_run_folder(tiny_run):
    names = {p.name for p in tiny_run.iterdir()}
    assert names == {"config.yaml", "log.jsonl", "data.png", "data.json", "samples", "checkpoints", "tensorboard"}


def test_resume_needs_no_more_than_the_folder(tiny_run, tmp_path):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    assert cli.main(["train", "--resume", "--out", str(run), "--steps", "3"]) == 0
    assert torch.load(run / "checkpoints" / "last.pt", weights_only=True)["step"] == 3


def test_a_second_run_in_the_same_folder_is_refused(tiny_run, sentence):
    before = (tiny_run / "config.yaml").read_bytes()
    assert cli.main(["train", "--config", str(tiny_run / "config.yaml")]) == 2
    assert "already holds a run: add --resume" in sentence()
    assert (tiny_run / "config.yaml").read_bytes() == before


def test_print_config_is_a_config(tmp_path, capsys):
    args = ["train", "--preset", "shapes-32", "--generator.attention-resolutions=[8,16]", "--seed=7", "--print-config"]
    assert cli.main(args) == 0
    printed = capsys.readouterr().out
    (tmp_path / "c.yaml").write_text(printed)
    assert yaml.safe_load(printed)["generator"]["attention_resolutions"] == [8, 16]
    assert cli.main(["train", "--config", str(tmp_path / "c.yaml"), "--print-config"]) == 0
    assert capsys.readouterr().out == printed


def test_a_diverged_run_is_status_1_and_a_sentence(tmp_path, monkeypatch, sentence):
    import sagan_fast.training.loop as loop

    original = loop.train_step
    monkeypatch.setattr(loop, "train_step", lambda *args: {k: v * float("nan") for k, v in original(*args).items()})
    args = ["train", "--preset", "shapes-32", "--out", str(tmp_path / "run"), "--steps", "2", "--device", "cpu"]
    args += ["--generator.base_channels=4", "--discriminator.base_channels=4", "--batch-size", "4"]
    assert cli.main(args) == 1
    assert "is nan at step 2; stopped, with the state in" in sentence()


def test_global_batch_is_another_name_for_the_batch_size(capsys, sentence):
    args = ["train", "--preset", "shapes-32", "--print-config"]
    assert cli.main([*args, "--global-batch", "48", "--micro-batch-size=12"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert (printed["batch_size"], printed["micro_batch_size"]) == (48, 12) and "global_batch" not in printed
    assert cli.main([*args, "--profile=-1"]) == 2
    assert "profile must be at least 0, got -1" in sentence()


def test_of_many_processes_one_says_what_is_wrong_with_the_line(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(SystemExit) as error:
        cli.main(["train", "--preset", "shapes-33", "--out", "x"])
    assert error.value.code == 2 and capsys.readouterr().err == ""


def test_too_little_memory_is_a_sentence_that_helps(tmp_path, monkeypatch, sentence):
    import sagan_fast.training.loop as loop

    def too_much(*_):
        raise torch.OutOfMemoryError("Tried to allocate 80 GiB.\nmore")

    monkeypatch.setattr(loop, "train_step", too_much)
    args = ["train", "--preset", "shapes-32", "--out", str(tmp_path / "run"), "--device", "cpu"]
    assert cli.main([*args, "--generator.base_channels=4", "--discriminator.base_channels=4"]) == 2
    assert "a --micro-batch-size below 32 takes fewer images at a time, auto finds one" in sentence()
