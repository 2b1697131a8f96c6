"""Whole runs: the folder, exact resumption, refusals, stops."""

import json
import os
import signal
import threading

import pytest
import torch
import yaml

import sagan_fast.training.loop as loop
from sagan_fast.errors import InputError
from sagan_fast.models.checkpoint import load_checkpoint
from sagan_fast.training.config import TrainConfig, read_yaml
from sagan_fast.training.health import Diverged

VARIES = ("time", "images_per_s", "loader_wait", "memory_gib")


def small(out, **overrides):
    narrow = {"base_channels": 4}
    defaults = dict(batch_size=8, steps=4, log_every=2, sample_every=4, checkpoint_every=2, device="cpu")
    return TrainConfig.from_preset(
        "shapes-32", out=str(out), generator=narrow, discriminator=narrow, **{**defaults, **overrides}
    )


def assert_same(a, b, where=""):
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


def test_a_run_folder_holds_everything(tmp_path, capsys):
    run = tmp_path / "run"
    loop.train(small(run))
    assert read_yaml(run / "config.yaml")["steps"] == 4
    entries = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [e["step"] for e in entries] == [2, 4]
    assert {"d_loss", "g_loss", "d_real", "d_fake", "images_per_s", "gamma/g.attentions.16", "gamma/d.attentions.16",
            "sigma_max/g", "sigma_max/d", "broken_images"} <= set(entries[0])  # fmt: skip
    assert (run / "samples" / "0000004.png").stat().st_size > 1000
    assert list((run / "tensorboard").iterdir())
    content = load_checkpoint(run / "checkpoints" / "last.pt")
    assert content["step"] == 4 and {"generator", "ema", "discriminator"} <= set(content)
    assert "done at step 4" in capsys.readouterr().out


def resumed_equals_straight(tmp_path, steps, **overrides):
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    loop.train(small(straight, steps=steps, **overrides))
    loop.train(small(stopped, steps=steps // 2, **overrides))
    torch.rand(7)  # the global generator of another process is elsewhere
    loop.train(small(stopped, steps=steps, **overrides), resume=True)
    a, b = (load_checkpoint(run / "checkpoints" / "last.pt") for run in (straight, stopped))
    for key in ("step", "generator", "ema", "discriminator", "g_spectral", "d_spectral", "g_optimizer", "d_optimizer"):
        assert_same(a[key], b[key], key)
    first, second = (
        [{k: v for k, v in json.loads(line).items() if k not in VARIES} for line in
         (run / "log.jsonl").read_text().splitlines()]
        for run in (straight, stopped)
    )  # fmt: skip
    assert first == second


def test_a_resumed_run_is_bit_identical_to_one_that_never_stopped(tmp_path):
    resumed_equals_straight(tmp_path, 6, checkpoint_every=3, log_every=3, flip=True)


@pytest.mark.slow
def test_fifty_steps_and_fifty_more_are_a_hundred(tmp_path):
    resumed_equals_straight(tmp_path, 100, checkpoint_every=50, log_every=10, flip=True, num_workers=2)


def test_a_folder_with_a_run_is_not_overwritten(tmp_path):
    loop.train(small(tmp_path / "run", steps=2))
    with pytest.raises(InputError, match="already holds a run: add --resume to go on with it, or choose another --out"):
        loop.train(small(tmp_path / "run", steps=2))


def test_another_configuration_is_not_resumed(tmp_path):
    loop.train(small(tmp_path / "run", steps=2))
    before = (tmp_path / "run" / "config.yaml").read_text()
    with pytest.raises(InputError, match=r"cannot be resumed: seed \(was 0, now 1\)"):
        loop.train(small(tmp_path / "run", steps=4, seed=1), resume=True)
    assert (tmp_path / "run" / "config.yaml").read_text() == before


def test_resume_starts_where_there_is_nothing_yet_and_ends_at_once_where_all_is_done(tmp_path):
    state = loop.train(small(tmp_path / "run", steps=2), resume=True)
    assert state.step == 2
    assert loop.train(small(tmp_path / "run", steps=2), resume=True).step == 2


def test_a_stop_signal_ends_the_run_with_a_checkpoint(tmp_path, capsys):
    timer = threading.Timer(0.0, os.kill, (os.getpid(), signal.SIGTERM))
    original = loop.train_step

    def step_then_signal(state, *args):
        values = original(state, *args)
        if state.step == 2:
            timer.run()
        return values

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_step", step_then_signal)
        loop.train(small(tmp_path / "run", steps=50, checkpoint_every=50))
    content = load_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")
    assert content["step"] == 2 and "stopped as asked at step 2" in capsys.readouterr().out


def test_nan_stops_with_a_sentence_and_keeps_the_last_good_checkpoint(tmp_path, monkeypatch):
    original = loop.train_step

    def poison(state, *args):
        values = original(state, *args)
        return {**values, "d_loss": values["d_loss"] * (float("nan") if state.step == 4 else 1.0)}

    monkeypatch.setattr(loop, "train_step", poison)
    run = tmp_path / "run"
    with pytest.raises(Diverged, match=r"d_loss is nan at step 4; stopped, with the state in .*stopped.pt"):
        loop.train(small(run, steps=8))
    assert load_checkpoint(run / "checkpoints" / "last.pt")["step"] == 2
    assert load_checkpoint(run / "checkpoints" / "stopped.pt")["step"] == 4


def test_cuda_that_is_not_there_is_a_sentence(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert loop.pick_device("auto").type == "cpu"
    with pytest.raises(InputError, match="device cuda was asked for, but PyTorch finds no CUDA device"):
        loop.pick_device("cuda")


def test_the_written_config_is_rerunnable_as_it_is(tmp_path):
    config = small(tmp_path / "run", steps=2)
    loop.train(config)
    values = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert TrainConfig.from_dict(values) == config
