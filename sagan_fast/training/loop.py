"""A training run from its configuration to its last checkpoint, read top to bottom."""

from contextlib import closing
from pathlib import Path

import torch

from sagan_fast.data import ImageDataset, batches, open_dataset
from sagan_fast.data.summary import summary
from sagan_fast.distributed import World, connected
from sagan_fast.errors import Diverged, InputError
from sagan_fast.training.advice import Advice
from sagan_fast.training.config import TrainConfig
from sagan_fast.training.cuda_graph import captured_step
from sagan_fast.training.evaluation import Evaluations
from sagan_fast.training.folder import RunFolder
from sagan_fast.training.health import Guard
from sagan_fast.training.log import Log, RunLog, SilentLog
from sagan_fast.training.memory import kept_memory
from sagan_fast.training.meter import Meter
from sagan_fast.training.micro_batch import with_micro_batch
from sagan_fast.training.pictures import save_data, show_samples
from sagan_fast.training.profile import Profile
from sagan_fast.training.run import Run
from sagan_fast.training.signals import Stop, StopVote, stop_on_signals
from sagan_fast.training.state import TrainState, check_backend, new_state
from sagan_fast.training.step import train_step
from sagan_fast.training.wandb_log import WandbBoard
from sagan_fast.words import counted

STOPPING = "stopping after this step; Ctrl-C again to stop now and lose what came after the last checkpoint"
EVALUATING = "stopping after this evaluation; Ctrl-C again to stop now, the checkpoint is saved"


def train(
    config: TrainConfig, *, resume: bool = False, resume_from: str = "", init_from: str = "", profile: int = 0
) -> TrainState:
    """Train until `config.steps` steps are done and return the state; all files are in the folder `config.out`.

    These are config.yaml, log.jsonl, data.png, data.json, tensorboard/, samples/*.png and checkpoints/. Under torchrun
    each process takes its share of every batch, and only the first writes and prints. SIGINT or SIGTERM to any process
    ends the run after this step or the next, with a checkpoint. RUN/profile/ gets a trace of `profile` steps.

    `resume` continues an existing run as if it had never stopped, on the CPU with as many processes bit for bit;
    otherwise a folder that holds a run is refused. It takes the newest checkpoint that is whole, or `resume_from`: a
    step, "best" or a file. `init_from`, a run folder or checkpoint, gives the weights that a new run begins with.

    Raises InputError for bad input (data, folder, checkpoint), ConnectionError when another process is lost, `Diverged`
    when training cannot continue. Then checkpoints/stopped.pt holds the last state and last.pt the last good one. With
    `config.on_divergence` "rollback" the run first returns to an earlier checkpoint, up to `max_rollbacks` times.
    """
    folder = RunFolder(Path(config.out), config.keep)
    resume = resume or bool(resume_from)
    if resume and init_from:
        raise InputError("--resume goes on with a run, and --init-from begins a new one: give one of them")
    with connected(config.device, config.timeout) as world, stop_on_signals() as stop:
        dataset, config = opened(config, world)
        world.by_main(lambda: folder.check(resume))
        config, sized = with_micro_batch(config, world, folder.path / "config.yaml" if resume else None)
        world.together(lambda: config.micro_batches(world.size))  # or a sentence
        guard = Guard(config.collapse_patience, growth=config.sigma_growth, loss=config.loss)
        run = Run(config, world, dataset, new_state(config, world.device), guard, folder)
        world.together(lambda: check_backend(run.state))
        run.check_start()
        try:
            changes = run.resume(resume_from) if resume else run.initialize(init_from) if init_from else []
            run.check_replicas()
            run.state.connect(world, config)
            world.by_main(lambda: folder.open(config))
            changes += world.from_main(run.set_aside) if resume_from else []
            state = run.state
            log = world.by_main(lambda: new_log(run)) or SilentLog()
            with log, state.precision.products(), kept_memory(world.device.type):
                log.say(
                    f"{folder.path}: {counted(len(dataset), 'image')} of {dataset.name}, "
                    f"{counted(dataset.num_classes, 'class')}, "
                    f"{world.device}, {state.precision.name}, {run.division()}step {state.step} of {config.steps}"
                )
                for sentence in [*filter(None, [sized, state.traffic()]), *summary(dataset), *changes]:
                    log.say(sentence)
                world.by_main(lambda: log.picture("data", save_data(dataset, folder.path / "data.png"), state.step))
                run.captured = captured_step(config, state, log.say, bool(sized))
                tracing = Profile(folder.path, profile if world.is_main else 0)
                while True:
                    try:
                        stop.answer = STOPPING
                        _go_on(run, log, stop, tracing)
                        return state
                    except Diverged as error:
                        sentence = run.roll_back(error)
                        world.by_main(lambda: log.back_to(state.step))
                        log.say(sentence)
        except KeyboardInterrupt as error:
            raise KeyboardInterrupt(folder.interrupted()) from error
        except torch.OutOfMemoryError as error:
            raise InputError(
                f"{world.device} has too little memory: a --micro-batch-size below "
                f"{config.batch_size // (world.size * config.micro_batches(world.size))} takes fewer images at a time, "
                "auto finds one that fits, and --checkpoint-activations true keeps less of each "
                f"({str(error).splitlines()[0]})"
            ) from error
        finally:
            folder.close()


def opened(config: TrainConfig, world: World) -> tuple[ImageDataset, TrainConfig]:
    """Return the data set of `config`, and `config` for its number of classes; InputError in all processes."""

    def open_it() -> tuple[ImageDataset, TrainConfig]:
        dataset = open_dataset(
            config.data,
            resolution=config.resolution,
            num_classes=None if config.classes_from_data else config.num_classes,
            on_broken=config.on_broken,
            classes=config.classes,
            unlabelled=config.unlabelled,
        )
        return dataset, config.with_classes(dataset.num_classes, dataset.why_unlabelled())

    return world.together(open_it)


def _go_on(run: Run, log: Log, stop: Stop, tracing: Profile) -> None:
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
    meter, advice = Meter(config, world), Advice(config)
    stopping = vote(bool(stop))
    with closing(stream), closing(Evaluations(run, log)) as evaluations:
        while state.step < config.steps and not stopping:
            with meter.waiting():
                images, labels = next(stream)
            if run.captured:
                measured = run.captured(images, labels)
            else:
                measured = train_step(state, config, images, labels, world.device)
            meter.add(measured)
            log.step_done(state.step, measured)
            if trace := tracing.step_done(state.step):
                log.say(f"trace of some steps in {trace}: open it in chrome://tracing or ui.perfetto.dev")
            stopping = vote(bool(stop))

            ending = state.step == config.steps
            saving = ending or stopping or state.step % config.checkpoint_every == 0
            if state.step % config.log_every == 0 or saving:
                values, curves = meter.read(state, run.dataset)
                world.by_main(lambda v=values, c=curves: log.line(state.step, v, c))  # type: ignore[misc]
                run.guard.check(state.step, values)
                for sentence in advice.read(state.step, values):
                    log.say(sentence)
            if saving:
                run.save()  # before anything slow: who asked to stop may not wait for long
            if ending or (state.step % config.sample_every == 0 and not stopping):
                picture = folder.path / "samples" / f"{state.step:07d}.png"
                world.by_main(lambda path=picture: show_samples(run, log, path))  # type: ignore[misc]
            if evaluations.due(state.step) and not stopping:
                if not saving:
                    run.save()
                stop.answer = EVALUATING
                meter.began += evaluations.start()
                stop.answer = STOPPING
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


def new_log(run: Run) -> RunLog:
    """Return the log of `run` for its main process, with the configuration in TensorBoard."""
    config = run.config
    boards = [WandbBoard(config.wandb, run.folder.path, config.to_dict())] if config.wandb else []
    log = RunLog(run.folder.path, run.state.step, config.steps, batch_size=config.batch_size, boards=boards)
    log.words("config", (run.folder.path / "config.yaml").read_text())
    return log
