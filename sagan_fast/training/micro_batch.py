"""Finds the largest micro-batch that fits the memory of a CUDA device, by trying steps."""

import dataclasses
import gc
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from sagan_fast.distributed import World
from sagan_fast.errors import InputError
from sagan_fast.training.config import TrainConfig, read_yaml
from sagan_fast.training.state import check_backend, new_state
from sagan_fast.training.step import train_step

SHARE_OF_MEMORY = 0.9
"""What a trial may use; the rest is for what it does not have, above all the buffers of NCCL."""


def with_micro_batch(config: TrainConfig, world: World, stored: Path | None) -> tuple[TrainConfig, str]:
    """Return `config` with a number for its micro-batch "auto", and a sentence about it; "" where it has a number.

    On CUDA that is the largest divisor of a process' share of the batch that fits every process' device. On the CPU it
    is the whole share. A run that goes on, whose configuration is the file `stored`, keeps its number if that divides
    the share: batch norm sees as many images as before. All processes must call it together. Raises InputError if the
    batch cannot be shared evenly, or not even one image fits.
    """
    given = world.gather(config.micro_batch_size)
    if config.micro_batch_size != "auto":
        return config, ""
    whole = dataclasses.replace(config, micro_batch_size=0)
    if given.count("auto") < world.size:
        return whole, ""  # the run will say that options differ
    world.together(lambda: whole.micro_batches(world.size))  # or a sentence
    share = config.batch_size // world.size
    before = world.from_main(lambda: read_yaml(stored).get("micro_batch_size") if stored and stored.exists() else None)
    if isinstance(before, int) and share % (before or share) == 0:
        found, why = before or share, "as before"
    elif world.device.type == "cuda":
        found = min(world.gather(world.together(lambda: search(config, share, world.device))))
        why = f"the largest divisor of {share} that fits {torch.cuda.get_device_name(world.device)}"
    else:
        found, why = share, "the whole share of a process; what fits is tried on CUDA devices only"
    return dataclasses.replace(config, micro_batch_size=found), f"micro-batch size {found}: {why}"


def search(config: TrainConfig, share: int, device: torch.device) -> int:
    """Return the largest divisor of `share` with which a step fits the free memory of `device`.

    Raises InputError if 1 does not fit.
    """
    divisors = [size for size in range(1, share + 1) if share % size == 0]
    found = largest(divisors, lambda size: fits(config, share, size, device))
    if found is None:
        raise InputError(
            f"{device} has too little memory for one image at a time: --checkpoint-activations true or a smaller "
            "base_channels takes less"
        )
    return found


def largest(sizes: Sequence[int], fit: Callable[[int], bool]) -> int | None:
    """Return the largest of the ascending `sizes` that `fit`, None if none does; what fits, fits with less too."""
    low, high = 0, len(sizes)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if fit(sizes[middle]) else (low, middle)
    return sizes[low - 1] if low else None


def fits(config: TrainConfig, share: int, size: int, device: torch.device) -> bool:
    """Return whether two steps with micro-batches of `size` images fit `device`; nothing of them is left.

    Two, because the first one makes what the optimizers keep. Each has two micro-batches where a step of the run has
    more than one, and all penalties.
    """
    batch = min(2 * size, share)
    trial = dataclasses.replace(config, batch_size=batch, micro_batch_size=size, sync_batch_norm=False, penalty_every=1)
    is_cuda = device.type == "cuda"
    if is_cuda:
        torch.cuda.set_per_process_memory_fraction(SHARE_OF_MEMORY, device)
    try:
        _two_steps(trial, device)
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        gc.collect()
        if is_cuda:
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(1.0, device)
            torch.cuda.reset_peak_memory_stats(device)  # what the run reports is its own


def _two_steps(trial: TrainConfig, device: torch.device) -> None:
    state = new_state(trial, device)
    check_backend(state)
    images = torch.zeros(trial.batch_size, 3, trial.resolution, trial.resolution, dtype=torch.uint8)
    labels = torch.zeros(trial.batch_size, dtype=torch.long)
    with state.precision.products():
        for _ in range(2):
            train_step(state, trial, images, labels, device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
