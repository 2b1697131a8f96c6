"""What `sagan-fast train` reads, writes and refuses."""

import json
import shutil

import pytest
import torch
import yaml
from PIL import Image

from sagan_fast import cli


def test_train_writes_the_run_folder(tiny_run):
    names = {p.name for p in tiny_run.iterdir()}
    assert names == {"config.yaml", "log.jsonl", "data.png", "data.json", "samples", "checkpoints", "tensorboard"}


def test_resume_needs_no_more_than_the_folder(tiny_run, tmp_path):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    assert cli.main(["train", "--resume", "--out", str(run), "--steps", "3"]) == 0
    assert torch.load(run / "checkpoints" / "last.pt", weights_only=True)["step"] == 3


def test_a_run_whose_last_checkpoint_is_damaged_goes_on_from_the_one_before(tiny_run, tmp_path, capsys):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    folder = run / "checkpoints"
    (folder / "last.pt").write_bytes((folder / "last.pt").read_bytes()[:999])  # a copy: the links were not kept
    (run / "config.yaml").unlink()
    assert cli.main(["train", "--preset", "shapes-32", "--out", str(run)]) == 2  # not overwritten either
    assert "already holds a run: add --resume" in capsys.readouterr().err
    assert cli.main(["train", "--resume", "--out", str(run), "--steps", "3"]) == 0
    said = capsys.readouterr().out
    assert f"{run / 'config.yaml'} is missing: the options are those of {folder / 'step-00000002.pt'}" in said
    assert f"{folder / 'last.pt'} is damaged or cut off: the run goes on from {folder / 'step-00000002.pt'}" in said
    assert "step 2 of 3" in said and torch.load(folder / "last.pt", weights_only=True)["step"] == 3
    for path in folder.glob("*.pt"):
        path.write_bytes(path.read_bytes()[:999])
    assert cli.main(["train", "--resume", "--out", str(run), "--steps", "4"]) == 2
    assert "no checkpoint in" in capsys.readouterr().err


def test_a_run_goes_back_to_an_earlier_checkpoint_and_loses_nothing(tiny_run, tmp_path, capsys, sentence):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    more = ["--steps", "4", "--checkpoint-every", "1", "--log-every", "1"]
    assert cli.main(["train", "--resume", "--out", str(run), *more]) == 0
    capsys.readouterr()
    assert cli.main(["train", "--resume-from", "3", "--out", str(run), "--steps", "3"]) == 0
    said = capsys.readouterr().out
    kept = run / "replaced" / "1"
    assert f"what came after step 3 is kept in {kept}: checkpoints/step-00000004.pt" in said
    assert "done at step 3" in said
    folder = run / "checkpoints"
    assert torch.load(folder / "last.pt", weights_only=True)["step"] == 3
    assert torch.load(kept / "checkpoints" / "step-00000004.pt", weights_only=True)["step"] == 4
    assert [json.loads(line)["step"] for line in (run / "replaced.jsonl").read_text().splitlines()] == [4]
    assert cli.main(["train", "--resume-from", "9", "--out", str(run)]) == 2
    assert "holds those of the steps 2, 3" in sentence()


def test_a_new_run_begins_with_the_weights_of_another(tiny_run, tmp_path, capsys):
    for name in ("ring", "ant"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (32, 32), (90 * i, 10, 200)).save(tmp_path / "data" / name / f"{i}.png")
    args = ["train", "--init-from", str(tiny_run), "--out", str(tmp_path / "run"), "--steps", "1", "--g-lr", "1e-5"]
    assert cli.main([*args, "--data", f"folder:{tmp_path / 'data'}"]) == 0
    said = capsys.readouterr().out
    assert "2 classes, cpu, fp32, step 0 of 1" in said and "step 2; the optimizers begin anew" in said
    assert "classes that it does not have begin as the mean of its classes: ant" in said
    assert "are left out: circle, square, triangle, cross, ..." in said
    config = torch.load(tmp_path / "run" / "checkpoints" / "last.pt", weights_only=True)["config"]
    assert (config["num_classes"], config["g_lr"], config["classes_from_data"]) == (2, 1e-5, False)


def test_what_cannot_be_resumed_names_the_way_round(tiny_run, tmp_path, sentence):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    assert cli.main(["train", "--resume", "--out", str(run), "--g-lr", "0.5"]) == 2
    said = sentence()
    assert "cannot be resumed: g_lr (was 0.001, now 0.5); to begin a new run from its weights, name a new" in said
    assert f"--init-from {run / 'checkpoints' / 'last.pt'} --out FOLDER" in said
    assert cli.main(["train", "--resume", "--out", str(tmp_path / "rum")]) == 2
    assert "there is no run in" in (said := sentence()) and "rum to resume: did you mean 'run'?" in said


def test_a_file_may_begin_with_a_preset(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("preset: shapes-32\nout: x\ngenerator: {base_channels: 4}\n")
    assert cli.main(["train", "--config", str(tmp_path / "c.yaml"), "--print-config"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["generator"]["base_channels"] == 4 and printed["generator"]["attention_resolutions"] == [16]
    assert (printed["batch_size"], printed["preset"], printed["classes_from_data"]) == (32, "shapes-32", True)


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
