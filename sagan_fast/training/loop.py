"""A training run from its configuration to its last checkpoint, read top to bottom."""

from __future__ import annotations

import io
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

import sagan_fast
from sagan_fast.data import ImageDataset, batches, open_dataset
from sagan_fast.errors import InputError
from sagan_fast.evaluation.sampling import classes, latents, sample
from sagan_fast.models.checkpoint import FORMAT, load_checkpoint
from sagan_fast.training.checkpoint import restore_rng, rng_state, save_atomically
from sagan_fast.training.config import TrainConfig
from sagan_fast.training.distributed import StopVote, World, connected, fingerprint, pick_device
from sagan_fast.training.folder import RunFolder
from sagan_fast.training.health import Diverged, Guard, memory_gib, network_values
from sagan_fast.training.log import RunLog, SilentLog
from sagan_fast.training.profile import Profile
from sagan_fast.training.signals import stop_on_signals
from sagan_fast.training.state import TrainState, new_state
from sagan_fast.training.step import train_step
from sagan_fast.visualize.grids import save_grid

__all__ = ["pick_device", "train"]

# What may differ between a run and its resumption; anything else would make it another run.
MAY_CHANGE = {
    "data", "out", "backend", "device", "steps", "num_workers", "log_every", "sample_every", "checkpoint_every",
    "on_broken", "collapse_patience", "micro_batch_size", "sync_batch_norm", "keep", "sigma_growth", "on_divergence",
    "max_rollbacks", "timeout",
}  # fmt: skip
SUMMED = ("d_loss", "g_loss", "d_real", "d_fake", "grad_norm/d", "grad_norm/g")


def train(config: TrainConfig, *, resume: bool = False, profile: int = 0) -> TrainState:
    """Train until `config.steps` steps are done and return the state; everything is in the folder `config.out`.

    Under torchrun this is one process of many: each takes its share of every batch, the first alone writes and speaks.
    Writes config.yaml, log.jsonl, tensorboard/, samples/*.png and checkpoints/. With `resume` a run that is there goes
    on as if it had never stopped (on the CPU, with as many processes, bit for bit); without, a folder that holds a run
    is refused. SIGINT and SIGTERM, to any process, end the run after the step at hand or the next one, with a
    checkpoint. `profile` steps are traced to RUN/profile/.

    Raises InputError for bad input (data, folder, checkpoint); ConnectionError when another process is lost;
    `Diverged` when it is no use going on: the state of that moment is in checkpoints/stopped.pt, the last good one
    still in last.pt. With `config.on_divergence` "rollback" the run goes back and on instead, a few times.
    """
    run = RunFolder(Path(config.out), config.keep)
    with connected(config.device, config.timeout) as world, stop_on_signals() as stop:
        world.together(lambda: config.micro_batches(world.size))  # or a sentence
        dataset = world.together(lambda: _open(config))
        world.by_main(lambda: run.check(resume))
        state = new_state(config, world.device)
        guard = Guard(config.collapse_patience, growth=config.sigma_growth)
        try:
            said = _resume(state, guard, config, world, run.checkpoints.last, resume)
            world.by_main(lambda: run.open(config))
            _check_replicas(state, world)
            log = world.by_main(lambda: RunLog(run.path, state.step, config.steps)) or SilentLog()
            with log, state.precision.products():
                log.say(
                    f"{run.path}: {len(dataset)} images of {dataset.name}, {dataset.num_classes or 'no'} classes, "
                    f"{world.device}, {state.precision.name}, {_division(config, world)}step {state.step} of "
                    f"{config.steps}"
                )
                for sentence in said:
                    log.say(sentence)
                tracing = Profile(run.path, profile if world.is_main else 0)
                while True:
                    try:
                        _go_on(state, config, world, dataset, run, log, guard, stop, tracing)
                        return state
                    except Diverged as error:
                        _roll_back_or_stop(error, state, guard, config, world, run, log)
        finally:
            run.close()


def _go_on(
    state: TrainState,
    config: TrainConfig,
    world: World,
    dataset: ImageDataset,
    run: RunFolder,
    log: SilentLog,
    guard: Guard,
    stop: list[int],
    tracing: Profile,
) -> None:
    """Train from the step `state` is at to the last, or until asked to stop; raise `Diverged` when the guard does."""
    stream: Any = batches(
        dataset,
        batch_size=config.batch_size // world.size,
        seed=config.seed,
        start=state.step * config.batch_size,
        num_workers=config.num_workers,
        rank=world.rank,
        world_size=world.size,
        pin_memory=world.device.type == "cuda",
    )
    vote = StopVote(world)
    meter = Meter(config, world)
    saved = -1
    stopping = vote(bool(stop))
    with closing(stream):
        while state.step < config.steps and not stopping:
            with meter.waiting():
                images, labels = next(stream)
            meter.add(train_step(state, config, images, labels, world.device, world))
            log.step_done(state.step)
            trace = tracing.step_done(state.step)
            if trace:
                log.say(f"trace of {profile_span(trace)} in {trace}: open it in chrome://tracing or ui.perfetto.dev")
            stopping = vote(bool(stop))

            ending = state.step == config.steps
            saving = ending or stopping or state.step % config.checkpoint_every == 0
            if state.step % config.log_every == 0 or saving:
                values, curves = meter.read(state, dataset)
                world.by_main(lambda v=values, c=curves: log.line(state.step, v, c))  # type: ignore[misc]
                guard.check(state.step, values)
            if saving:
                # Before anything slow: who asked to stop may not wait for long.
                _save(state, guard, config, world, run)
                saved = state.step
            if ending or (state.step % config.sample_every == 0 and not stopping):
                world.by_main(lambda: save_samples(state, config, run.sample_path(state.step)))
            # In-training evaluation belongs here: all processes come by with the same state; it may read state.ema and
            # call run.checkpoints.pin_best(step, metric, score) in the main process where `saved == state.step`.
            if not meter.steps:
                meter.restart()  # sampling and saving are not training
    vote.settle()
    tracing.close()
    word = "done" if state.step >= config.steps else "stopped as asked"
    where = (
        f"checkpoint {run.checkpoints.last}" if saved >= 0 or run.checkpoints.last.exists() else "nothing to save yet"
    )
    log.say(f"{run.path}: {word} at step {state.step}; {where}")


class Meter:
    """Sums what each step measures on the device, and reads it out for a line of the log: nothing waits in between."""

    def __init__(self, config: TrainConfig, world: World) -> None:
        self.config, self.world = config, world
        self.sums: torch.Tensor | None = None
        self.steps = 0
        self.restart()

    def restart(self) -> None:
        """Start the clock."""
        self.began, self.waited = time.perf_counter(), 0.0

    def waiting(self) -> Meter:
        """Return the context within which the run waits for images."""
        return self

    def __enter__(self) -> None:
        self.wait_began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.waited += time.perf_counter() - self.wait_began

    def add(self, values: dict[str, torch.Tensor]) -> None:
        """Add the numbers of a step."""
        mine = torch.stack([values[name].float() for name in SUMMED])
        self.sums = mine if self.sums is None else self.sums + mine
        self.steps += 1

    def read(self, state: TrainState, dataset: ImageDataset) -> tuple[dict[str, float], dict[str, float]]:
        """Return the means over steps and processes since the last call, and what TensorBoard alone gets."""
        assert self.sums is not None
        sums = (self.sums / self.steps).tolist()
        seconds = time.perf_counter() - self.began
        *means, broken = self.world.total([*sums, float(dataset.num_broken)])
        wait, memory = self.world.largest([self.waited / seconds, memory_gib(self.world.device)])
        values = {name: mean / self.world.size for name, mean in zip(SUMMED, means, strict=True)}
        values["images_per_s"] = self.steps * self.config.batch_size / seconds
        values |= {"loader_wait": round(wait, 4), "memory_gib": round(memory, 3)}
        networks, curves = network_values(state)
        values |= networks
        values |= {"broken_images": int(broken), "rollbacks": state.rollbacks}
        self.sums, self.steps = None, 0
        return values, curves


def checkpoint(
    state: TrainState, config: TrainConfig, guard: Guard | None = None, world: World | None = None
) -> dict[str, Any]:
    """Return all that a resumed run needs, as plain data; the order of the images follows from seed and step.

    All processes must call this together.
    """
    world = world or World(torch.device("cpu"))
    states = world.gather(_as_bytes(rng_state()))
    return {
        "format": FORMAT,
        "config": config.to_dict(),
        "rng": rng_state(),
        "ranks": [_from_bytes(other) for other in states],
        "norm_batch": config.norm_batch(world.size),
        "guard": guard.state_dict() if guard is not None else {},
        "versions": {"sagan_fast": sagan_fast.__version__, "torch": str(torch.__version__)},
        **state.state_dict(),
    }


def save_samples(state: TrainState, config: TrainConfig, path: Path) -> None:
    """Write the grid of the averaged generator for the fixed z of the run: a row a class, of up to ten classes."""
    rows, columns = min(config.num_classes, 10) or 8, 8
    z = latents(rows * columns, config.generator.z_dim, config.seed)
    y = classes(rows * columns, min(config.num_classes, rows))
    try:
        save_grid(torch.cat(list(sample(state.ema, z, y))), path, columns)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error


def _open(config: TrainConfig) -> ImageDataset:
    return open_dataset(
        config.data, resolution=config.resolution, num_classes=config.num_classes, on_broken=config.on_broken
    )


def _division(config: TrainConfig, world: World) -> str:
    parts = config.micro_batches(world.size)
    if world.size == 1 and parts == 1:
        return ""
    each = config.batch_size // (world.size * parts)
    return f"{world.size} {'processes' if world.size > 1 else 'process'} x {parts} x {each} images a step, "


def profile_span(trace: Path) -> str:
    """Return what the name of a trace says."""
    return f"the steps from {int(trace.stem.removeprefix('step-'))} on"


def _save(state: TrainState, guard: Guard, config: TrainConfig, world: World, run: RunFolder) -> None:
    _check_replicas(state, world)
    content = checkpoint(state, config, guard, world)
    world.by_main(lambda: run.checkpoints.save(content, state.step))


def _check_replicas(state: TrainState, world: World) -> None:
    """Raise ConnectionError unless all processes hold the same weights, averages, u and v, bit for bit."""
    if world.size == 1:
        return
    models = (state.generator, state.discriminator, state.ema)
    if not world.agrees([state.step, *fingerprint(t for model in models for t in model.state_dict().values())]):
        raise ConnectionError(
            f"the {world.size} processes of this run no longer have the same weights at step {state.step}: their "
            "hardware or software differs; the last checkpoint is good, and --resume goes on from it"
        )


def _resume(state: TrainState, guard: Guard, config: TrainConfig, world: World, path: Path, resume: bool) -> list[str]:
    """Put every process where the checkpoint `path` is, which only the main one must be able to read, if there is one.

    Return sentences on what is not as it was.
    """

    def read() -> bytes | None:
        if not resume or not path.exists():
            return None
        load_checkpoint(path)  # or its sentence
        return path.read_bytes()

    content = world.share(world.by_main(read))
    if content is None:
        return []
    return world.together(lambda: _restore(state, guard, config, world, _from_bytes(content), path))


def _restore(
    state: TrainState, guard: Guard, config: TrainConfig, world: World, content: dict[str, Any], path: Path
) -> list[str]:
    before, now = content["config"], config.to_dict()
    changed = [key for key in now if key not in MAY_CHANGE and before.get(key) != now[key]]
    if changed:
        said = ", ".join(f"{key} (was {before.get(key)}, now {now[key]})" for key in changed)
        raise InputError(f"{path} belongs to another configuration and cannot be resumed: {said}")
    state.load_state_dict(content)
    guard.load_state_dict(content.get("guard", {}))
    states = content.get("ranks", [content["rng"]])
    sentences = []
    if len(states) == world.size:
        restore_rng(states[world.rank])
    else:
        sentences.append(
            f"resumed with {world.size} processes instead of {len(states)}: weights, optimizers, the order of the "
            "images and the noise go on where they were; PyTorch's global random numbers start anew"
        )
    norm_batch = content.get("norm_batch", config.norm_batch(world.size))
    if norm_batch != config.norm_batch(world.size):
        sentences.append(
            f"batch norm now sees {config.norm_batch(world.size)} images at a time instead of {norm_batch}, which "
            "changes the training: set --micro-batch-size or --sync-batch-norm for as many as before"
        )
    return sentences


def _roll_back_or_stop(
    error: Diverged, state: TrainState, guard: Guard, config: TrainConfig, world: World, run: RunFolder, log: SilentLog
) -> None:
    """Raise `error`, with the state kept; or put `state` back to a checkpoint before it and change the noise."""
    stopped = run.checkpoints.folder / "stopped.pt"
    content = checkpoint(state, config, guard, world)
    world.by_main(lambda: save_atomically(content, stopped))
    good = run.checkpoints.before(error.healthy_until) if world.is_main else None
    back = world.share(None if good is None else good.read_bytes())
    if config.on_divergence == "stop" or state.rollbacks >= config.max_rollbacks or back is None:
        after = f" after {state.rollbacks} rollbacks" if state.rollbacks else ""
        if not world.is_main:
            raise SystemExit(1)  # the main process says it
        raise Diverged(f"{error}; stopped{after}, with the state in {stopped}", error.healthy_until) from None
    rollbacks = state.rollbacks + 1
    saved = _from_bytes(back)
    state.load_state_dict(saved)
    guard.load_state_dict(saved.get("guard", {}))
    state.rollbacks = rollbacks
    world.by_main(lambda: run.checkpoints.drop_after(state.step))
    _save(state, guard, config, world, run)  # or a resumed run would go on from the checkpoint that went wrong
    world.by_main(lambda: log.back_to(state.step))
    log.say(f"{error}; rolled back to step {state.step}, rollback {rollbacks} of {config.max_rollbacks}, other noise")


def _as_bytes(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def _from_bytes(data: bytes) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    return content
