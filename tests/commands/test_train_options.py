"""The help of `sagan-fast train`, and the options that it lists."""

import dataclasses

import pytest

from sagan_fast import cli
from sagan_fast.commands.train_options import Action, known_keys, train_parser
from sagan_fast.training.config import TrainConfig


def helped(capsys, *args):
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", *args])
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_the_help_fits_two_screens_and_shows_the_values_of_the_preset(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    said = helped(capsys, "--preset", "tiny-imagenet-64", "--help")
    assert len(said.splitlines()) <= 52 and max(map(len, said.splitlines())) <= 80
    assert (
        "Training:\n  --steps N " in said
        and "--batch-size N               images a step, over all processes (64)" in said
    )
    assert "_" not in said.replace("sagan_fast", "") and "Example: sagan-fast train --preset" in said
    assert "(256)" in helped(capsys, "-h") and "--lecam-decay" not in said


def test_all_options_are_there_when_asked_for(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    said = helped(capsys, "--help-all", "--preset=cifar-32")
    names = [*known_keys(), *(field.name for field in dataclasses.fields(Action))]
    missing = [name for name in names if f"--{name.replace('_', '-')} " not in said.replace("\n", " ")]
    assert not missing
    assert "whole share of batch-size" in " ".join(said.split())
    assert "(default: [4,4,4,4])" in " ".join(said.split()) and "null" not in said


def test_a_flag_may_be_followed_by_its_value():
    parser = train_parser(False, {})
    for args, value in ((["--flip"], True), (["--flip", "false"], False), (["--flip=true"], True), ([], False)):
        assert parser.parse_args(args).as_dict()["flip"] is value


def test_every_field_is_a_key():
    own = {field.name for field in dataclasses.fields(TrainConfig)} - {"generator", "discriminator"}
    assert own <= set(known_keys()) and "generator.z_dim" in known_keys() and "generator.resolution" not in known_keys()
