"""kill -9 at random moments: the last checkpoint is whole, and the run ends as if nothing had happened."""

import random
import time

import pytest
import torch

from sagan_fast.models.checkpoint import load_checkpoint
from shared_by_tests import run_ranks, start_ranks

OPTIONS = [
    "train", "--resume", "--preset=shapes-32", "--resolution=16", "--batch-size=4", "--micro-batch-size=2",
    "--checkpoint-every=1", "--log-every=4", "--sample-every=1000", "--device=cpu", "--keep=2", "--timeout=60",
    "--generator.base_channels=4", "--generator.channel_multipliers=[4,2,1]", "--generator.attention_resolutions=[8]",
    "--discriminator.base_channels=4", "--discriminator.channel_multipliers=[1,2]",
    "--discriminator.attention_resolutions=[8]",
]  # fmt: skip


def command(args):
    import contextlib
    import os

    from sagan_fast import cli

    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        return cli.main(args)


def kill_and_resume(tmp_path, generator, kills, longest, sizes):
    """Kill the run `kills` times, each time with another number of processes, and let it end; compare."""
    chance = random.Random(int(torch.randint(2**31, (), generator=generator)))
    run, straight = tmp_path / "run", tmp_path / "straight"
    last = run / "checkpoints" / "last.pt"
    before = 0
    for kill in range(kills):
        ranks = start_ranks(command, sizes[kill % len(sizes)], [*OPTIONS, f"--out={run}", f"--steps={10**6}"])
        try:
            deadline = time.monotonic() + 90
            # Any moment from the beginning of the work on: half of the kills before the first new checkpoint.
            if chance.random() < 0.5:
                while not any(int(path.stem[5:]) > before for path in last.parent.glob("step-*.pt")):
                    assert time.monotonic() < deadline and ranks[0].is_alive()
                    time.sleep(0.02)
            time.sleep(chance.uniform(0.0, longest))
        finally:
            for process in ranks:
                process.kill()
                process.join()
        if last.exists():
            step = load_checkpoint(last)["step"]
            assert step >= before
            before = step
    total = max(before, 1) + 2
    assert run_ranks(command, sizes[-1], [*OPTIONS, f"--out={run}", f"--steps={total}"]) == [0] * sizes[-1]
    assert run_ranks(command, 1, [*OPTIONS, f"--out={straight}", f"--steps={total}"]) == [0]
    assert not [path.name for path in last.parent.iterdir() if path.name.startswith(".")]
    killed, never = load_checkpoint(last), load_checkpoint(straight / "checkpoints" / "last.pt")
    for part in ("generator", "discriminator", "ema"):
        for name, tensor in never[part].items():
            if "running" in name:  # averaged over processes in another order
                torch.testing.assert_close(killed[part][name], tensor, rtol=1e-4, atol=1e-5)
            else:
                assert torch.equal(killed[part][name], tensor), name


def test_a_run_killed_three_times_ends_as_one_that_never_was(tmp_path, generator):
    kill_and_resume(tmp_path, generator, kills=3, longest=0.3, sizes=(1,))


@pytest.mark.slow
def test_a_run_killed_twenty_times_on_one_and_two_processes_ends_as_one_that_never_was(tmp_path, generator):
    kill_and_resume(tmp_path, generator, kills=20, longest=1.0, sizes=(1, 2))
