"""A training run from its configuration to its last checkpoint, read top to bottom."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import sagan_fast
from sagan_fast.data import batches, open_dataset
from sagan_fast.errors import InputError
from sagan_fast.evaluation.sampling import classes, latents, sample
from sagan_fast.layers.self_attention import SelfAttention2d
from sagan_fast.models.checkpoint import FORMAT, load_checkpoint
from sagan_fast.training.checkpoint import restore_rng, rng_state, save_atomically
from sagan_fast.training.config import TrainConfig
from sagan_fast.training.health import Diverged, Guard
from sagan_fast.training.log import RunLog
from sagan_fast.training.state import TrainState, new_state
from sagan_fast.training.step import train_step
from sagan_fast.visualize.grids import save_grid

# What may differ between a run and its resumption; anything else would make it another run.
MAY_CHANGE = {
    "data", "out", "backend", "device", "steps", "num_workers", "log_every", "sample_every", "checkpoint_every",
    "on_broken", "collapse_patience",
}  # fmt: skip


def train(config: TrainConfig, *, resume: bool = False) -> TrainState:
    """Train until `config.steps` steps are done and return the state; everything is in the folder `config.out`.

    Writes config.yaml, log.jsonl, tensorboard/, samples/*.png and checkpoints/last.pt. With `resume` a run that is
    there goes on as if it had never stopped (on the CPU bit for bit); without, a folder that holds a run is
    refused. SIGINT and SIGTERM end the run after the step at hand, with a checkpoint.

    Raises InputError for bad input (data, folder, checkpoint), `Diverged` when it is no use going on: the state of
    that moment is in checkpoints/stopped.pt, the last good one still in last.pt.
    """
    device = pick_device(config.device)
    dataset = open_dataset(
        config.data, resolution=config.resolution, num_classes=config.num_classes, on_broken=config.on_broken
    )
    run = Path(config.out)
    last = run / "checkpoints" / "last.pt"
    state = new_state(config, device)
    if resume and last.exists():
        _resume(state, config, load_checkpoint(last), last)
    else:
        _refuse_to_overwrite(run, resume)
    _write_config(config, run)

    stream = batches(
        dataset,
        batch_size=config.batch_size,
        seed=config.seed,
        start=state.step * config.batch_size,
        num_workers=config.num_workers,
        pin_memory=device.type == "cuda",
    )
    guard = Guard(config.collapse_patience)
    with RunLog(run, state.step, config.steps) as log, _stop_on_signals() as stop, state.precision.products():
        log.say(
            f"{run}: {len(dataset)} images of {dataset.name}, {dataset.num_classes or 'no'} classes, "
            f"{device}, {state.precision.name}, step {state.step} of {config.steps}"
        )
        totals: dict[str, torch.Tensor] = {}
        since, began = 0, time.perf_counter()
        values: dict[str, float] = {}
        while state.step < config.steps and not stop:
            images, labels = next(stream)
            for name, value in train_step(state, config, images, labels, device).items():
                totals[name] = totals[name] + value if name in totals else value
            since += 1
            log.step_done(state.step)

            ending = state.step == config.steps or bool(stop)
            saving = ending or state.step % config.checkpoint_every == 0
            if state.step % config.log_every == 0 or saving:
                values = {name: (total / since).item() for name, total in totals.items()}
                values["images_per_s"] = since * config.batch_size / (time.perf_counter() - began)
                values |= network_values(state)
                values["broken_images"] = dataset.num_broken
                log.line(state.step, values)
                totals, since = {}, 0
                try:
                    guard.check(state.step, values)
                except Diverged as error:
                    stopped = run / "checkpoints" / "stopped.pt"
                    save_atomically(checkpoint(state, config, dataset.class_names), stopped)
                    raise Diverged(f"{error}; stopped, with the state in {stopped}") from None
            if ending or state.step % config.sample_every == 0:
                save_samples(state, config, run / "samples" / f"{state.step:07d}.png")
            if saving:
                save_atomically(checkpoint(state, config, dataset.class_names), last)
            if not since:
                began = time.perf_counter()  # sampling and saving are not training
        word = "stopped as asked" if state.step < config.steps else "done"
        log.say(f"{run}: {word} at step {state.step}; checkpoint {last}")
    return state


def checkpoint(state: TrainState, config: TrainConfig, class_names: Sequence[str] = ()) -> dict[str, Any]:
    """Return all that a resumed run needs, as plain data; the order of the images follows from seed and step."""
    return {
        "format": FORMAT,
        "config": config.to_dict(),
        "class_names": list(class_names),
        "rng": rng_state(),
        "versions": {"sagan_fast": sagan_fast.__version__, "torch": str(torch.__version__)},
        **state.state_dict(),
    }


def network_values(state: TrainState) -> dict[str, float]:
    """Return gamma of every attention block, the largest sigma of each network and skipped steps, for the log."""
    values = {}
    for letter, network, group in (
        ("g", state.generator, state.g_spectral),
        ("d", state.discriminator, state.d_spectral),
    ):
        for name, module in network.named_modules():
            if isinstance(module, SelfAttention2d):
                values[f"gamma/{letter}.{name}"] = module.gamma.item()
        values[f"sigma_max/{letter}"] = max(float(sigma) for sigma in group.sigmas().values())
    if state.precision.name == "fp16":
        values |= {"skipped_steps/g": state.g_scaler.skipped, "skipped_steps/d": state.d_scaler.skipped}
    return values


def save_samples(state: TrainState, config: TrainConfig, path: Path) -> None:
    """Write the grid of the averaged generator for the fixed z of the run: a row a class, of up to ten classes."""
    rows, columns = min(config.num_classes, 10) or 8, 8
    z = latents(rows * columns, config.generator.z_dim, config.seed)
    y = classes(rows * columns, min(config.num_classes, rows))
    save_grid(torch.cat(list(sample(state.ema, z, y))), path, columns)


def pick_device(name: str) -> torch.device:
    """Return the device `name` stands for ("auto" is cuda where there is one); InputError if it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("device cuda was asked for, but PyTorch finds no CUDA device here")
    return torch.device(name)


def _resume(state: TrainState, config: TrainConfig, content: dict[str, Any], path: Path) -> None:
    before, now = content["config"], config.to_dict()
    changed = [key for key in now if key not in MAY_CHANGE and before.get(key) != now[key]]
    if changed:
        said = ", ".join(f"{key} (was {before.get(key)}, now {now[key]})" for key in changed)
        raise InputError(f"{path} belongs to another configuration and cannot be resumed: {said}")
    state.load_state_dict(content)
    restore_rng(content["rng"])


def _refuse_to_overwrite(run: Path, resume: bool) -> None:
    if run.exists() and not run.is_dir():
        raise InputError(f"{run} is a file: --out must name a folder")
    if not resume and (run / "config.yaml").exists():
        raise InputError(f"{run} already holds a run: add --resume to go on with it, or choose another --out")


def _write_config(config: TrainConfig, run: Path) -> None:
    import yaml

    path = run / "config.yaml"
    try:
        for folder in (run, run / "samples", run / "checkpoints"):
            folder.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(config.to_dict(), sort_keys=False, default_flow_style=None))
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error


@contextmanager
def _stop_on_signals() -> Iterator[list[int]]:
    """Yield a list that a first SIGINT or SIGTERM is appended to; a second SIGINT interrupts at once."""
    received: list[int] = []

    def note(number: int, _frame: object) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    try:
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: the caller handles signals
        yield received
        return
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
