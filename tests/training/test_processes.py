"""Processes that train together: their number does not change the training, and they start, stop and fail as one."""

import contextlib
import json
import os
import re
import signal
import time

import pytest
import torch

from sagan_fast import cli
from sagan_fast.distributed import connected
from sagan_fast.models.checkpoint import load_checkpoint
from sagan_fast.training import step as step_module
from sagan_fast.training.config import TrainConfig
from sagan_fast.training.state import new_state
from sagan_fast.training.step import train_step
from shared_by_tests import run_ranks, start_ranks

TINY = dict(
    resolution=16,
    generator={"base_channels": 4, "channel_multipliers": [4, 2, 1], "attention_resolutions": [8]},
    discriminator={"base_channels": 4, "channel_multipliers": [1, 2, 2], "attention_resolutions": [8]},
)


def steps(folder, count, dtype, overrides):
    """Take `count` steps on random images, each rank its share of the same; leave the numbers and the state."""
    config = TrainConfig.from_preset("shapes-32", out="x", batch_size=16, **{**TINY, **overrides})
    rng = torch.Generator().manual_seed(1)
    torch.set_default_dtype(dtype)
    prepare = step_module.prepare_batch
    with connected("cpu", 60) as world:
        state = new_state(config, world.device)
        for model in (state.generator, state.discriminator, state.ema, state.lecam):
            model.to(dtype)
        state.connect(world, config)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(step_module, "prepare_batch", lambda *args: (prepare(*args)[0].to(dtype), prepare(*args)[1]))
            lines = []
            for _ in range(count):
                images = torch.randint(256, (16, 3, 16, 16), dtype=torch.uint8, generator=rng)
                labels = torch.randint(10, (16,), generator=rng)
                mine = slice(world.rank, None, world.size)
                values = train_step(state, config, images[mine], labels[mine], world.device)
                lines.append(torch.tensor(world.gather([v.item() for v in values.values()])).mean(0).tolist())
        torch.save({"lines": torch.tensor(lines), **state.state_dict()}, folder / f"{world.size}-{world.rank}.pt")
    torch.set_default_dtype(torch.float32)


def both(folder, count, dtype, **overrides):
    """Return what one process and what the first of two makes of the same steps; the two must agree bit for bit."""
    assert run_ranks(steps, 2, folder, count, dtype, overrides) == [0, 0]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the two have: sums over threads are rounded otherwise
    try:
        steps(folder, count, dtype, overrides)
    finally:
        torch.set_num_threads(threads)
    one, first, second = (torch.load(folder / f"{name}.pt") for name in ("1-0", "2-0", "2-1"))
    for part in ("generator", "discriminator", "ema", "lecam"):
        for name, tensor in first[part].items():
            assert torch.equal(tensor, second[part][name]), name
    return one, first


def furthest(one, other):
    return max(
        (other[part][name] - tensor).abs().max().item()
        for part in ("generator", "discriminator", "ema", "lecam")
        for name, tensor in one[part].items()
    )


def test_two_processes_of_eight_equal_one_of_sixteen_with_synced_batch_norm(tmp_path):
    # In float64: float32 would show its noise, which Adam without momentum makes as large as a step wherever the
    # gradient is nothing else (the biases ahead of a batch norm).
    one, two = both(tmp_path, 10, torch.float64, sync_batch_norm=True, flip=True)
    torch.testing.assert_close(two["lines"], one["lines"], rtol=1e-6, atol=1e-6)  # the losses are float32
    assert furthest(one, two) < 1e-9


@pytest.mark.slow
def test_the_same_in_float32_to_its_noise(tmp_path):
    one, two = both(tmp_path, 10, torch.float32, sync_batch_norm=True, flip=True)
    torch.testing.assert_close(two["lines"][0], one["lines"][0], rtol=1e-4, atol=1e-5)
    scores = [0, 1, 2, 4]  # losses and scores; gradient norms follow the biases that are noise
    torch.testing.assert_close(two["lines"][:, scores], one["lines"][:, scores], rtol=0.0, atol=1e-2)


def test_without_it_the_same_micro_batches_give_the_same_bits_on_one_process_and_on_two(tmp_path):
    one, two = both(tmp_path, 4, torch.float32, micro_batch_size=8)
    torch.testing.assert_close(two["lines"], one["lines"], rtol=1e-6, atol=1e-6)
    for part in ("generator", "discriminator"):
        for name, tensor in one[part].items():
            if "running" in name:  # averaged in another order
                torch.testing.assert_close(two[part][name], tensor, rtol=1e-5, atol=1e-6)
            else:
                assert torch.equal(two[part][name], tensor), name


def test_each_of_two_processes_in_two_micro_batches_equals_one_process_in_four(tmp_path):
    penalties = dict(r1_gamma=0.5, r2_gamma=0.25, gp_weight=1.0, lecam_weight=0.5)
    changed = dict(diffaugment="color,translation,cutout")
    one, two = both(tmp_path, 4, torch.float64, micro_batch_size=4, loss="relativistic", **penalties, **changed)
    torch.testing.assert_close(two["lines"], one["lines"], rtol=1e-6, atol=1e-6)
    assert furthest(one, two) < 1e-9


def options(run, total, **overrides):
    values = {"batch_size": 8, "checkpoint_every": 2, "log_every": 2, "sample_every": 100, "device": "cpu", **overrides}
    flags = [f"--{name}={value}" for name, value in values.items()]
    nets = [
        f"--{network}.{key}={value}"
        for network in ("generator", "discriminator")
        for key, value in TINY[network].items()
    ]
    return ["train", "--preset=shapes-32", f"--out={run}", f"--steps={total}", "--resolution=16", *flags, *nets]


def command(folder, args):
    """Run `sagan-fast args`; what it says goes to folder/out-RANK and folder/err-RANK."""
    rank = os.environ["RANK"]
    out, err = ((folder / f"{name}-{rank}").open("a", buffering=1) for name in ("out", "err"))
    with out, err, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        return cli.main(args)


def lines(run):
    varies = ("time", "images_per_s", "loader_wait", "memory_gib")
    entries = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return [{key: value for key, value in entry.items() if key not in varies} for entry in entries]


def assert_same_state(a, b):
    for part in ("generator", "discriminator", "ema", "g_spectral", "d_spectral"):
        for name, tensor in a[part].items():
            assert torch.equal(tensor, b[part][name]), f"{part}.{name}"
    for part in ("g_optimizer", "d_optimizer"):
        for index, moments in a[part]["state"].items():
            assert all(torch.equal(moments[key], b[part]["state"][index][key]) for key in moments)


def test_two_processes_resume_bit_for_bit_and_one_process_goes_on_from_them(tmp_path):
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    assert run_ranks(command, 2, tmp_path, options(straight, 4)) == [0, 0]
    assert run_ranks(command, 2, tmp_path, options(stopped, 2)) == [0, 0]
    assert run_ranks(command, 2, tmp_path, [*options(stopped, 4), "--resume"]) == [0, 0]
    a, b = (load_checkpoint(run / "checkpoints" / "last.pt") for run in (straight, stopped))
    assert a["step"] == b["step"] == 4 and len(a["ranks"]) == 2
    assert_same_state(a, b)
    assert lines(straight) == lines(stopped)
    assert (tmp_path / "out-1").read_text() == "" and (tmp_path / "err-1").read_text() == ""
    said = (tmp_path / "out-0").read_text()
    assert "2 processes x 1 x 4 images a step, step 2 of 4" in said
    assert "MB travel in 1 buckets of the generator and 1 of the discriminator" in said

    assert run_ranks(command, 1, tmp_path, [*options(stopped, 6), "--resume"]) == [0]
    said = (tmp_path / "out-0").read_text()
    assert "resumed with 1 process instead of 2: weights, optimizers, the order of the images" in said
    assert "batch norm now sees 8 images at a time instead of 4" in said
    assert load_checkpoint(stopped / "checkpoints" / "last.pt")["step"] == 6


def wait_for(what, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_signal_to_one_process_stops_all_at_the_same_step_with_a_checkpoint(tmp_path):
    run = tmp_path / "run"
    ranks = start_ranks(command, 2, tmp_path, options(run, 100000))
    try:
        wait_for((run / "checkpoints" / "last.pt").exists)
        os.kill(ranks[1].pid, signal.SIGTERM)
        for process in ranks:
            process.join(60)
        assert [process.exitcode for process in ranks] == [0, 0]
    finally:
        for process in ranks:
            process.kill()
    stopped = re.search(r"stopped as asked at step (\d+); checkpoint", (tmp_path / "out-0").read_text())
    assert load_checkpoint(run / "checkpoints" / "last.pt")["step"] == int(stopped[1])


def test_a_lost_process_ends_the_others_with_a_sentence(tmp_path):
    run = tmp_path / "run"
    ranks = start_ranks(command, 2, tmp_path, options(run, 100000))
    try:
        wait_for((run / "checkpoints" / "last.pt").exists)
        ranks[1].kill()
        ranks[0].join(60)
        assert ranks[0].exitcode == 1
    finally:
        for process in ranks:
            process.kill()
    said = (tmp_path / "err-0").read_text()
    assert said.startswith("sagan-fast: this run of 2 processes lost one of them") and said.count("\n") == 1
    assert load_checkpoint(run / "checkpoints" / "last.pt")["step"] >= 2


def command_with_a_nan(folder, args):
    """As `command`, but the second process' loss is NaN at step 3, once."""
    from sagan_fast.training import loop

    original, left = loop.train_step, [os.environ["RANK"] == "1"]

    def poison(state, *rest):
        values = original(state, *rest)
        if state.step == 3 and left[0]:
            left[0] = False
            values["g_loss"] = values["g_loss"] * float("nan")
        return values

    loop.train_step = poison
    return command(folder, args)


def test_all_processes_roll_back_together(tmp_path):
    args = options(tmp_path / "run", 4, checkpoint_every=1, log_every=1, on_divergence="rollback")
    assert run_ranks(command_with_a_nan, 2, tmp_path, args) == [0, 0]
    said = (tmp_path / "out-0").read_text()
    assert "g_loss is nan at step 3; rolled back to step 2, rollback 1 of 3" in said and "done at step 4" in said
    assert [entry["rollbacks"] for entry in lines(tmp_path / "run")] == [0, 0, 1, 1]


def test_an_input_error_is_said_once(tmp_path):
    assert run_ranks(command, 2, tmp_path, options(tmp_path / "run", 4, data="folder:/nowhere")) == [2, 2]
    assert (tmp_path / "err-0").read_text().count("\n") == 1 and "/nowhere" in (tmp_path / "err-0").read_text()
    assert run_ranks(command, 2, tmp_path, options(tmp_path / "run", 4, batch_size=7)) == [2, 2]
    said = (tmp_path / "err-0").read_text().splitlines()
    assert said[1].endswith("--batch-size must be divisible by the number of processes = 2, got 7") and len(said) == 2
    assert (tmp_path / "err-1").read_text() == "" and not (tmp_path / "run").exists()
