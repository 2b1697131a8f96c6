"""Whole runs: the folder, exact resumption, refusals, stops."""

import errno
import json
import os
import signal
import threading

import pytest
import torch
import yaml

import sagan_fast.training.loop as loop
from sagan_fast.errors import Diverged, InputError
from sagan_fast.models.checkpoint import load_checkpoint
from sagan_fast.training import signals
from sagan_fast.training.config import TrainConfig, read_yaml
from shared_by_tests import assert_same

VARIES = ("time", "images_per_s", "loader_wait", "memory_gib")


def small(out, **overrides):
    narrow = {"base_channels": 4}
    defaults = dict(batch_size=8, steps=4, log_every=2, sample_every=4, checkpoint_every=2, device="cpu")
    return TrainConfig.from_preset(
        "shapes-32", out=str(out), generator=narrow, discriminator=narrow, **{**defaults, **overrides}
    )


def test_a_run_folder_holds_everything(tmp_path, capsys):
    run = tmp_path / "run"
    loop.train(small(run))
    assert read_yaml(run / "config.yaml")["steps"] == 4
    entries = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [e["step"] for e in entries] == [2, 4]
    assert {"d_loss", "g_loss", "d_real", "d_fake", "images_per_s", "gamma/g.attentions.16", "gamma/d.attentions.16",
            "sigma_max/g", "sigma_max/d", "grad_norm/g", "grad_norm/d", "loader_wait", "memory_gib", "skipped_steps/g",
            "skipped_steps/d", "broken_images"} <= set(entries[0])  # fmt: skip
    assert (run / "samples" / "0000004.png").stat().st_size > 1000
    assert list((run / "tensorboard").iterdir())
    content = load_checkpoint(run / "checkpoints" / "last.pt")
    assert content["step"] == 4 and {"generator", "ema", "discriminator"} <= set(content)
    said = capsys.readouterr().out
    assert "done at step 4" in said and "500 images in each class" in said


def resumed_equals_straight(tmp_path, steps, **overrides):
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    loop.train(small(straight, steps=steps, **overrides))
    loop.train(small(stopped, steps=steps // 2, **overrides))
    torch.rand(7)  # the global generator of another process is elsewhere
    loop.train(small(stopped, steps=steps, **overrides), resume=True)
    a, b = (load_checkpoint(run / "checkpoints" / "last.pt") for run in (straight, stopped))
    parts = ("generator", "ema", "discriminator", "g_spectral", "d_spectral", "g_optimizer", "d_optimizer", "lecam")
    for key in ("step", *parts):
        assert_same(a[key], b[key], key)
    first, second = (
        [{k: v for k, v in json.loads(line).items() if k not in VARIES} for line in
         (run / "log.jsonl").read_text().splitlines()]
        for run in (straight, stopped)
    )  # fmt: skip
    assert first == second


def test_a_resumed_run_is_bit_identical_to_one_that_never_stopped(tmp_path):
    resumed_equals_straight(tmp_path, 6, checkpoint_every=3, log_every=3, flip=True)


def test_averages_of_scores_and_the_interval_of_penalties_go_on_after_a_resumption(tmp_path):
    options = dict(loss="relativistic", r1_gamma=1.0, gp_weight=1.0, lecam_weight=0.5, penalty_every=2, batch_size=4)
    options["diffaugment"] = "color,translation,cutout"
    resumed_equals_straight(tmp_path, 6, checkpoint_every=3, log_every=1, **options)
    entries = [json.loads(line) for line in (tmp_path / "stopped" / "log.jsonl").read_text().splitlines()]
    assert ["r1" in entry for entry in entries] == [True, False] * 3 and all("lecam" in entry for entry in entries)


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


def test_a_second_ctrl_c_ends_the_run_at_once(tmp_path, monkeypatch, capfd):
    original = loop.train_step

    def interrupted(state, *args):
        if state.step == 3:
            signal.raise_signal(signal.SIGINT)
            assert "stopping after this step; Ctrl-C again to stop now" in capfd.readouterr().err
            monkeypatch.setattr(signals, "IMPATIENCE", -1.0)
            signal.raise_signal(signal.SIGINT)
        return original(state, *args)

    monkeypatch.setattr(loop, "train_step", interrupted)
    with pytest.raises(KeyboardInterrupt, match="interrupted; the last checkpoint is of step 2; --resume goes on"):
        loop.train(small(tmp_path / "run"))
    monkeypatch.undo()
    assert loop.train(small(tmp_path / "run"), resume=True).step == 4


def test_a_run_that_failed_before_its_first_checkpoint_does_not_block_its_folder(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            loop.train(small(tmp_path / "run", steps=2))
    assert loop.train(small(tmp_path / "run", steps=2)).step == 2


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


def test_the_written_config_is_rerunnable_as_it_is(tmp_path):
    config = small(tmp_path / "run", steps=2)
    loop.train(config)
    values = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert TrainConfig.from_dict(values) == config.with_classes(10)


def test_the_newest_checkpoints_are_kept(tmp_path):
    loop.train(small(tmp_path / "run", steps=3, checkpoint_every=1, keep=2))
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["last.pt", "step-00000002.pt", "step-00000003.pt"]


def poisoned_at(step, times):
    """Return a train_step that makes NaN of a loss at `step`, so many times."""
    original, left = loop.train_step, [times]

    def poison(state, *args):
        values = original(state, *args)
        if state.step == step and left[0]:
            left[0] -= 1
            values["g_loss"] = values["g_loss"] * float("nan")
        return values

    return poison


def test_a_rollback_goes_on_from_before_with_other_noise(tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    options = dict(steps=6, checkpoint_every=1, log_every=1, sample_every=9)
    straight = loop.train(small(tmp_path / "straight", **options))
    monkeypatch.setattr(loop, "train_step", poisoned_at(4, times=1))
    state = loop.train(small(run, on_divergence="rollback", **options))
    assert state.step == 6 and state.rollbacks == 1
    assert not torch.equal(state.generator.conv.bias, straight.generator.conv.bias)
    assert "g_loss is nan at step 4; rolled back to step 3, rollback 1 of 3, other noise" in capsys.readouterr().out
    entries = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [(e["step"], e["rollbacks"]) for e in entries] == [(1, 0), (2, 0), (3, 0), (4, 1), (5, 1), (6, 1)]
    assert json.loads((run / "diverged.jsonl").read_text())["step"] == 4
    assert load_checkpoint(run / "checkpoints" / "stopped.pt")["step"] == 4
    assert load_checkpoint(run / "checkpoints" / "last.pt")["rollbacks"] == 1


def test_rollbacks_end(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "train_step", poisoned_at(2, times=9))
    config = small(tmp_path / "run", checkpoint_every=1, log_every=1, on_divergence="rollback", max_rollbacks=2)
    with pytest.raises(Diverged, match="g_loss is nan at step 2; stopped after 2 rollbacks"):
        loop.train(config)
    assert load_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")["rollbacks"] == 2


def test_before_the_first_checkpoint_there_is_nothing_to_roll_back_to(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "train_step", poisoned_at(1, times=1))
    with pytest.raises(Diverged, match="g_loss is nan at step 1; stopped, with"):
        loop.train(small(tmp_path / "run", log_every=1, on_divergence="rollback"))


def test_a_full_disk_ends_the_run_with_a_sentence_and_the_checkpoint_before(tmp_path, monkeypatch):
    original = torch.save

    def full(content, file):
        if content.get("step") == 4:
            file.write(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(content, file)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(InputError, match=r"cannot write the checkpoint .*step-00000004.pt: No space left on device"):
        loop.train(small(tmp_path / "run", steps=6))
    folder = tmp_path / "run" / "checkpoints"
    assert load_checkpoint(folder / "last.pt")["step"] == 2
    assert sorted(path.name for path in folder.iterdir()) == ["last.pt", "step-00000002.pt"]
    monkeypatch.undo()
    assert loop.train(small(tmp_path / "run", steps=6), resume=True).step == 6


def test_micro_batches_are_said_and_their_number_may_change(tmp_path, capsys):
    loop.train(small(tmp_path / "run", steps=2, micro_batch_size=4))
    assert "1 process x 2 x 4 images a step, step 0 of 2" in capsys.readouterr().out
    loop.train(small(tmp_path / "run", steps=4), resume=True)
    assert "batch norm now sees 8 images at a time instead of 4" in capsys.readouterr().out
    with pytest.raises(InputError, match="number of processes x micro_batch_size = 1 x 3, got 8"):
        loop.train(small(tmp_path / "other", micro_batch_size=3))


def test_a_trace_is_written_when_asked_for(tmp_path, capsys):
    loop.train(small(tmp_path / "run", steps=5), profile=1)
    (trace,) = (tmp_path / "run" / "profile").iterdir()
    assert f"in {trace}: open it in" in capsys.readouterr().out and "traceEvents" in json.loads(trace.read_text())


@pytest.mark.gpu
def test_between_lines_of_the_log_nothing_waits_for_the_device(tmp_path, monkeypatch):
    original = loop.train_step

    def strict(state, *args):
        torch.cuda.set_sync_debug_mode("error" if state.step > 1 else "default")  # the first builds tables
        try:
            return original(state, *args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(loop, "train_step", strict)
    for precision in ("bf16", "fp16"):
        loop.train(small(tmp_path / precision, device="cuda", precision=precision, steps=6, log_every=6))
