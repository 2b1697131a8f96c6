"""`train --dry-run`: checks what a run needs, measures three steps, and writes nothing."""

import os
import shutil
import time
from contextlib import closing
from datetime import datetime, timedelta
from pathlib import Path

import torch
from torch import nn

from sagan_fast.data import ImageDataset, batches
from sagan_fast.data.summary import summary
from sagan_fast.distributed import World, connected
from sagan_fast.errors import InputError
from sagan_fast.layers.explain import explain
from sagan_fast.models.checkpoint import holds_checkpoints
from sagan_fast.training.config import TrainConfig
from sagan_fast.training.cuda_graph import refusal
from sagan_fast.training.folder import RunFolder
from sagan_fast.training.health import memory_gib
from sagan_fast.training.loop import opened
from sagan_fast.training.memory import kept_memory
from sagan_fast.training.micro_batch import with_micro_batch
from sagan_fast.training.state import TrainState, check_backend, new_state
from sagan_fast.training.step import train_step
from sagan_fast.words import counted

STEPS = 3
"""Steps that are measured, after a first one that is not."""
TENSORS_A_WEIGHT = 4
"""A checkpoint holds a weight, two moments of Adam and, for the generator, an average."""


def rehearse(config: TrainConfig, *, resume: bool = False) -> list[str]:
    """Check data, folder, backend and memory of the run `config`, and print what it will be like; return the lines.

    They say parameters, images and steps per epoch, which backend runs each attention and why, seconds per step, memory
    and the estimated end. Under torchrun all processes take the steps together. Nothing is written. Raises InputError
    as the run would.
    """
    with connected(config.device, config.timeout) as world:
        dataset, config = opened(config, world)
        out = Path(config.out)
        world.by_main(lambda: RunFolder(out, config.keep).check(resume))
        config, sized = with_micro_batch(config, world, out / "config.yaml" if resume else None)
        world.together(lambda: config.micro_batches(world.size))
        state = new_state(config, world.device)
        world.together(lambda: check_backend(state))
        state.connect(world, config)
        gigabytes = _disk_gb(state) * (config.keep + 1)
        world.by_main(lambda: check_place(out, gigabytes))
        try:
            seconds = _seconds_a_step(state, config, dataset, world)
        except torch.OutOfMemoryError as error:
            raise InputError(
                f"{world.device} has too little memory for this run: try a smaller --micro-batch-size "
                f"({str(error).splitlines()[0]})"
            ) from error
        memory = max(world.gather(memory_gib(world.device)))
    per_epoch = len(dataset) / config.batch_size
    batch, steps = counted(config.batch_size, "image"), counted(config.steps, "step")
    rows = [("data", f"{counted(len(dataset), 'image')} of {dataset.name}, {counted(dataset.num_classes, 'class')}")]
    rows += [("", line) for line in [*summary(dataset), *filter(None, [sized])]]
    rows += [
        ("epochs", f"{per_epoch:.1f} steps of {batch} an epoch; {steps}: {config.steps / per_epoch:.1f} epochs"),
        ("generator", described(state.generator)),
        ("discriminator", described(state.discriminator)),
        *(("attention", line) for line in _attentions(state)),
        ("device", f"{world.device}, {state.precision.name}, {counted(world.size, 'process')}"),
        ("memory", f"{memory:.2f} GiB at most{_of(world.device)}"),
        ("disk", f"about {1000 * gigabytes:.0f} MB for {counted(config.keep + 1, 'checkpoint')} in {out}"),
        ("speed", f"{seconds:.3g} s a step, {config.batch_size / seconds:.0f} images/s"),
        ("end", _end(config, seconds)),
    ]  # fmt: skip
    if config.cuda_graph is True:
        why_not = refusal(state, bool(sized))
        rows.append(("cuda graph", f"none: {why_not}" if why_not else "each step; its memory and speed are not tried"))
    if holds_checkpoints(out):
        rows.append(("folder", f"{out} holds a run, which --resume goes on with"))
    lines = [*(f"{name:14}{text}" for name, text in rows), "nothing was written: leave out --dry-run to start"]
    if world.is_main:
        print("\n".join(lines), flush=True)
    return lines


def _seconds_a_step(state: TrainState, config: TrainConfig, dataset: ImageDataset, world: World) -> float:
    """Return the mean time of STEPS steps, after a first one."""
    stream = batches(
        dataset,
        batch_size=config.batch_size // world.size,
        seed=config.seed,
        num_workers=config.num_workers,
        rank=world.rank,
        world_size=world.size,
        pin_memory=world.device.type == "cuda",
    )
    began = 0.0
    with closing(stream), state.precision.products(), kept_memory(world.device.type):
        for step in range(STEPS + 1):
            train_step(state, config, *next(stream), world.device)
            if step == 0:
                _wait(world.device)
                began = time.perf_counter()
        _wait(world.device)
    return (time.perf_counter() - began) / STEPS


def check_place(out: Path, gigabytes: float) -> None:
    """Raise InputError unless the folder `out` can be made, written, and hold so many gigabytes of checkpoints."""
    place = out.absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise InputError(f"{place} is a file: --out must name a folder")
    if not os.access(place, os.W_OK):
        raise InputError(f"cannot write in {place}: --out must name a folder that can be written")
    free = shutil.disk_usage(place).free / 1e9
    if free < gigabytes:
        raise InputError(
            f"the disk of {place} has {free:.1f} GB free, and the checkpoints need {gigabytes:.1f} GB: free some "
            "space, choose another --out, or keep fewer with --keep"
        )


def described(network: nn.Module) -> str:
    """Return the number of parameters of `network`, in words."""
    return f"{sum(parameter.numel() for parameter in network.parameters()):,} parameters"


def _attentions(state: TrainState) -> list[str]:
    """Return for each attention the letter of its network, its name, the backend that ran, and why."""
    return [
        f"{letter}: {line}"
        for letter, network in (("G", state.generator), ("D", state.discriminator))
        for line in explain(network).splitlines()
        if line.startswith("attentions")
    ]


def _disk_gb(state: TrainState) -> float:
    """Return about how many gigabytes a checkpoint takes."""
    sizes = [sum(p.numel() for p in network.parameters()) for network in (state.generator, state.discriminator)]
    return 4 * (TENSORS_A_WEIGHT * sizes[0] + (TENSORS_A_WEIGHT - 1) * sizes[1]) / 1e9


def _of(device: torch.device) -> str:
    if device.type == "cuda":
        return f" of {torch.cuda.get_device_properties(device).total_memory / 2**30:.0f}"
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return f" of {os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f}"
    return ""


def _end(config: TrainConfig, seconds: float) -> str:
    whole = timedelta(seconds=round(seconds * config.steps))
    end = datetime.now() + whole
    beside = " and evaluations" if config.eval_every else ""
    takes = f"{counted(config.steps, 'step')} in {whole} without samples{beside}"
    return f"{takes}: {end:%Y-%m-%d %H:%M} if it starts now"


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
