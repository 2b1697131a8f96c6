"""A training run from its configuration to its last checkpoint, read top to bottom."""

import json
from contextlib import closing, suppress
from pathlib import Path

import torch

from sagan_fast.data import ImageDataset, batches, open_dataset
from sagan_fast.data.summary import pictured, record, summary
from sagan_fast.distributed import connected
from sagan_fast.errors import Diverged, InputError
from sagan_fast.evaluation.sampling import classes, latents, sample
from sagan_fast.files import written
from sagan_fast.training.config import TrainConfig
from sagan_fast.training.evaluation import Evaluations
from sagan_fast.training.folder import RunFolder
from sagan_fast.training.health import Guard
from sagan_fast.training.log import Log, RunLog, SilentLog
from sagan_fast.training.memory import kept_memory
from sagan_fast.training.meter import Meter
from sagan_fast.training.profile import Profile
from sagan_fast.training.run import Run
from sagan_fast.training.signals import StopVote, stop_on_signals
from sagan_fast.training.state import TrainState, new_state
from sagan_fast.training.step import train_step
from sagan_fast.visualize.grids import labelled_grid, save_grid, save_png


def train(config: TrainConfig, *, resume: bool = False, profile: int = 0) -> TrainState:
    """Train until `config.steps` steps are done and return the state; all files are in the folder `config.out`.

    These are config.yaml, log.jsonl, data.png, data.json, tensorboard/, samples/*.png and checkpoints/. Under torchrun
    each process takes its share of every batch, and only the first writes and prints. `resume` continues an existing
    run as if it had never stopped, on the CPU with as many processes bit for bit; otherwise a folder that holds a run
    is refused. SIGINT or SIGTERM to any process ends the run after this step or the next, with a checkpoint.
    RUN/profile/ gets a trace of `profile` steps.

    Raises InputError for bad input (data, folder, checkpoint), ConnectionError when another process is lost, `Diverged`
    when training cannot continue. Then checkpoints/stopped.pt holds the last state and last.pt the last good one. With
    `config.on_divergence` "rollback" the run first returns to an earlier checkpoint, up to `max_rollbacks` times.
    """
    folder = RunFolder(Path(config.out), config.keep)
    with connected(config.device, config.timeout) as world, stop_on_signals() as stop:
        world.together(lambda: config.micro_batches(world.size))  # or a sentence
        dataset = world.together(
            lambda: open_dataset(
                config.data,
                resolution=config.resolution,
                num_classes=config.num_classes,
                on_broken=config.on_broken,
                classes=config.classes,
                unlabelled=config.unlabelled,
            )
        )
        world.by_main(lambda: folder.check(resume))
        guard = Guard(config.collapse_patience, growth=config.sigma_growth, loss=config.loss)
        run = Run(config, world, dataset, new_state(config, world.device), guard, folder)
        run.check_start()
        try:
            changes = run.resume() if resume else []
            run.check_replicas()
            world.by_main(lambda: folder.open(config))
            state = run.state
            log = world.by_main(lambda: RunLog(folder.path, state.step, config.steps)) or SilentLog()
            with log, state.precision.products(), kept_memory(world.device.type):
                log.say(
                    f"{folder.path}: {len(dataset)} images of {dataset.name}, {dataset.num_classes or 'no'} classes, "
                    f"{world.device}, {state.precision.name}, {run.division()}step {state.step} of {config.steps}"
                )
                for sentence in [*summary(dataset), *changes]:
                    log.say(sentence)
                world.by_main(lambda: save_data(dataset, folder.path / "data.png"))
                tracing = Profile(folder.path, profile if world.is_main else 0)
                while True:
                    try:
                        _go_on(run, log, stop, tracing)
                        return state
                    except Diverged as error:
                        sentence = run.roll_back(error)
                        world.by_main(lambda: log.back_to(state.step))
                        log.say(sentence)
        except torch.OutOfMemoryError as error:
            raise InputError(
                f"{world.device} has too little memory: a --micro-batch-size below "
                f"{config.batch_size // (world.size * config.micro_batches(world.size))} takes fewer images at a time "
                f"({str(error).splitlines()[0]})"
            ) from error
        finally:
            folder.close()


def _go_on(run: Run, log: Log, stop: list[int], tracing: Profile) -> None:
    """Train from the current step to the last, or until asked to stop; raise `Diverged` when the guard does."""
    config, world, state, folder = run.config, run.world, run.state, run.folder
    stream = batches(
        run.dataset,
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
    stopping = vote(bool(stop))
    with closing(stream), closing(Evaluations(run, log)) as evaluations:
        while state.step < config.steps and not stopping:
            with meter.waiting():
                images, labels = next(stream)
            meter.add(train_step(state, config, images, labels, world.device, world))
            log.step_done(state.step)
            if trace := tracing.step_done(state.step):
                log.say(f"trace of some steps in {trace}: open it in chrome://tracing or ui.perfetto.dev")
            stopping = vote(bool(stop))

            ending = state.step == config.steps
            saving = ending or stopping or state.step % config.checkpoint_every == 0
            if state.step % config.log_every == 0 or saving:
                values, curves = meter.read(state, run.dataset)
                world.by_main(lambda v=values, c=curves: log.line(state.step, v, c))  # type: ignore[misc]
                run.guard.check(state.step, values)
            if saving:
                run.save()  # before anything slow: who asked to stop may not wait for long
            if ending or (state.step % config.sample_every == 0 and not stopping):
                picture = folder.path / "samples" / f"{state.step:07d}.png"
                world.by_main(lambda path=picture: save_samples(state, config, path))  # type: ignore[misc]
            if evaluations.due(state.step) and not stopping:
                if not saving:
                    run.save()
                meter.began += evaluations.start()
            evaluations.poll()
            if not meter.steps:
                meter.restart()  # sampling and saving are not training
        evaluations.finish(stop)
    vote.settle()
    tracing.close()
    word = "done" if state.step >= config.steps else "stopped as asked"
    last = folder.checkpoints.last
    where = f"checkpoint {last}" if world.is_main and last.exists() else "nothing to save yet"
    log.say(f"{folder.path}: {word} at step {state.step}; {where}")


def save_data(dataset: ImageDataset, path: Path) -> None:
    """Write a picture of eight images of up to five classes, with their names, and what was found to a .json beside it.

    What cannot be read is left white: the training will say so when it needs it.
    """
    indices, names = pictured(dataset)
    images = torch.ones(indices.size, 3, dataset.resolution, dataset.resolution)
    for place, index in enumerate(indices.reshape(-1).tolist()):
        with suppress(InputError):
            images[place] = dataset.load(index).float() / 127.5 - 1
    save_png(labelled_grid(images, names), path)
    with written(path.with_suffix(".json")) as file:
        file.write(json.dumps(record(dataset), indent=1).encode() + b"\n")


def save_samples(state: TrainState, config: TrainConfig, path: Path) -> None:
    """Write a grid of the averaged generator's images for fixed z, a row for each of up to ten classes."""
    rows, columns = min(config.num_classes, 10) or 8, 8
    z = latents(rows * columns, config.generator.z_dim, config.seed)
    y = classes(rows * columns, min(config.num_classes, rows))
    save_grid(torch.cat(list(sample(state.ema, z, y))), path, columns)
