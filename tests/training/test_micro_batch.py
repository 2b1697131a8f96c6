"""`--micro-batch-size auto`: the largest that fits, found by steps that leave nothing behind."""

from types import SimpleNamespace

import pytest
import torch

from sagan_fast.distributed import World
from sagan_fast.errors import InputError
from sagan_fast.training import micro_batch
from sagan_fast.training.config import TrainConfig
from sagan_fast.training.micro_batch import fits, largest, search, with_micro_batch

CPU = torch.device("cpu")


def config(**overrides):
    narrow = {"base_channels": 4, "attention_resolutions": [8]}
    small = dict(resolution=16, generator={**narrow, "channel_multipliers": [2, 2, 1]})
    small["discriminator"] = {**narrow, "channel_multipliers": [1, 2]}
    return TrainConfig.from_preset("shapes-32", out="x", **{"micro_batch_size": "auto", **small, **overrides})


@pytest.mark.parametrize("most", range(9))
def test_the_largest_is_found(most):
    sizes, tried = [1, 2, 4, 8], []
    found = largest(sizes, lambda size: tried.append(size) or size <= most)
    assert found == max((size for size in sizes if size <= most), default=None) and len(tried) <= 3


def test_out_of_memory_is_caught_and_nothing_of_the_trials_stays(monkeypatch):
    seen = []
    real = micro_batch.train_step

    def step(state, trial, images, labels, device):
        seen.append((len(images), trial.micro_batch_size, state.step))
        if trial.micro_batch_size > 3 and state.step == 1:
            raise torch.OutOfMemoryError("full")
        return real(state, trial, images, labels, device)

    monkeypatch.setattr(micro_batch, "train_step", step)
    before = torch.get_rng_state()
    assert search(config(batch_size=12, sync_batch_norm=True), 12, CPU) == 3
    assert {(6, 3, 0), (6, 3, 1), (8, 4, 1)} <= set(seen) and torch.equal(before, torch.get_rng_state())
    assert fits(config(batch_size=3), 3, 3, CPU) and seen[-1] == (3, 3, 1)
    monkeypatch.setattr(micro_batch, "fits", lambda *args: False)
    with pytest.raises(InputError, match="too little memory for one image at a time: --checkpoint-activations true"):
        search(config(batch_size=4), 4, CPU)


def test_on_the_cpu_it_is_the_whole_share_and_a_sentence_says_so(tmp_path):
    found, said = with_micro_batch(config(batch_size=12), World(CPU), None)
    assert found.micro_batch_size == 12 and said == (
        "micro-batch size 12: the whole share of a process; what fits is tried on CUDA devices only"
    )
    given = config(micro_batch_size=4)
    assert with_micro_batch(given, World(CPU), None) == (given, "")


def test_a_run_that_goes_on_keeps_its_number_if_it_can(tmp_path):
    stored = tmp_path / "config.yaml"
    for before, now in ((4, 4), (5, 12), (0, 12)):
        stored.write_text(f"micro_batch_size: {before}\n")
        assert with_micro_batch(config(batch_size=12), World(CPU), stored)[0].micro_batch_size == now


def test_the_smallest_of_all_processes_counts_and_options_must_agree(monkeypatch):
    others = {"auto": ["auto", "auto"], 4: [4, 2]}
    world = SimpleNamespace(
        size=2, device=SimpleNamespace(type="cuda"), gather=others.get, together=lambda f: f(), from_main=lambda f: f()
    )
    monkeypatch.setattr(micro_batch, "search", lambda *args: 4)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H200")
    found, said = with_micro_batch(config(batch_size=16), world, None)
    assert found.micro_batch_size == 2 and said == "micro-batch size 2: the largest divisor of 8 that fits H200"
    others["auto"] = ["auto", 4]
    assert with_micro_batch(config(batch_size=16), world, None)[0].micro_batch_size == 0
    others["auto"] = ["auto", "auto"]
    with pytest.raises(InputError, match="batch_size must be divisible by the number of processes = 2, got 15"):
        with_micro_batch(config(batch_size=15), world, None)


def test_what_it_may_be():
    with pytest.raises(InputError, match="micro_batch_size must be auto or a whole number, got 'most'"):
        config(micro_batch_size="most")
    with pytest.raises(ValueError, match="must be found first"):
        config().micro_batches(1)


@pytest.mark.gpu
def test_a_real_device(generator):
    device = torch.device("cuda")
    before = torch.cuda.memory_allocated()
    assert search(config(batch_size=8), 8, device) == 8
    assert torch.cuda.memory_allocated() == before
    hog = torch.empty(int(torch.cuda.mem_get_info()[0] * 0.93), dtype=torch.uint8, device=device)
    assert not fits(TrainConfig.from_preset("official-128-feat64", data="-", out="-"), 256, 256, device)
    del hog
