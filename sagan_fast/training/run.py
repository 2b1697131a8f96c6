"""Holds the parts of a run in one process, writes them to checkpoints and restores them."""

import io
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sagan_fast.data import ImageDataset
from sagan_fast.data.classes import take_order
from sagan_fast.distributed import World
from sagan_fast.errors import Diverged, InputError
from sagan_fast.models.checkpoint import FORMAT, find_checkpoint, load_checkpoint
from sagan_fast.training.config import TrainConfig
from sagan_fast.training.cuda_graph import CapturedStep
from sagan_fast.training.folder import RunFolder, restore_rng, rng_state, save_atomically
from sagan_fast.training.health import Guard
from sagan_fast.training.initialize import initialize
from sagan_fast.training.log import keep_lines_after
from sagan_fast.training.state import TrainState
from sagan_fast.version import __version__
from sagan_fast.words import counted

# What may differ between a run and its resumption; anything else would make it another run.
MAY_CHANGE = {
    "data", "out", "backend", "device", "steps", "num_workers", "log_every", "sample_every", "checkpoint_every",
    "on_broken", "collapse_patience", "micro_batch_size", "sync_batch_norm", "keep", "sigma_growth", "on_divergence",
    "max_rollbacks", "timeout", "eval_every", "eval_count", "eval_data", "eval_reference_count", "eval_features",
    "eval_metrics", "eval_mode", "eval_device", "classes", "unlabelled", "preset", "classes_from_data", "wandb",
    "bucket_cap_mb", "gradient_compression", "checkpoint_activations", "cuda_graph",
}  # fmt: skip


@dataclass
class Run:
    """The parts of a run in this process. All processes must call each method together."""

    config: TrainConfig
    world: World
    dataset: ImageDataset
    state: TrainState
    guard: Guard
    folder: RunFolder
    source: Path | None = None
    """the checkpoint that was resumed"""
    captured: CapturedStep | None = None
    """what does the steps in place of `train_step`"""

    def check_start(self) -> None:
        """Raise InputError in the main process, and end the others, unless all have the same options and images.

        Where the images lie, and how many processes read them, may differ from machine to machine.
        """
        config = {k: v for k, v in self.config.to_dict().items() if k not in ("data", "out", "num_workers")}
        images = zlib.crc32(
            repr((len(self.dataset), self.dataset.class_names)).encode(), zlib.crc32(self.dataset.labels.tobytes())
        )
        for numbers, what in (
            (zlib.crc32(repr(config).encode()), "with different options: the line must be the same everywhere"),
            (images, f"on different images: {self.config.data} must hold the same everywhere"),
        ):
            if not self.world.agrees([numbers]):
                if not self.world.is_main:
                    raise SystemExit(2)  # the main process says it
                raise InputError(f"the {self.world.size} processes of this run were started {what}")

    def content(self) -> dict[str, Any]:
        """Return all that a resumed run needs, as plain data; the order of the images follows from seed and step."""
        return {
            "format": FORMAT,
            "config": self.config.to_dict(),
            "class_names": list(self.dataset.class_names),
            "rng": rng_state(),
            "ranks": self.world.gather(rng_state()),
            "norm_batch": self.config.norm_batch(self.world.size),
            "images": len(self.dataset),
            "guard": self.guard.state_dict(),
            "versions": {"sagan_fast": __version__, "torch": str(torch.__version__)},
            **self.state.state_dict(),
        }

    def save(self) -> None:
        """Write the checkpoint of this step; if that fails, all processes end, the main one with InputError."""
        self.check_replicas()
        content = self.content()
        self.world.by_main(lambda: self.folder.checkpoints.save(content, self.state.step))

    def check_replicas(self) -> None:
        """Raise ConnectionError unless all processes hold the same weights, averages, u and v, bit for bit."""
        if self.world.size == 1:
            return
        models = (self.state.generator, self.state.discriminator, self.state.ema, self.state.lecam)
        tensors = (tensor for model in models for tensor in model.state_dict().values())
        if not self.world.agrees([self.state.step, *bit_sums(tensors)]):
            raise ConnectionError(
                f"the {self.world.size} processes of this run no longer have the same weights at step "
                f"{self.state.step}: their hardware or software differs; the last checkpoint is good, and --resume "
                "goes on from it"
            )

    def resume(self, which: str = "") -> list[str]:
        """Restore the newest checkpoint in every process, if there is one; return sentences about what has changed.

        `which` is another one: a step, "best" or a file. Only the main process reads it. Raises InputError if it is
        broken or belongs to another configuration.
        """

        def read() -> tuple[Path, bytes, str] | None:
            if not which:
                return self.folder.checkpoints.newest()
            path = self.folder.checkpoints.chosen(which)
            load_checkpoint(path)  # or its sentence
            return path, path.read_bytes(), f"the run goes on from {path}"

        found = self.world.share(self.world.by_main(read))
        if found is None:
            return [f"there is no checkpoint in {self.folder.path} yet: the run starts at step 0"]
        path, content, said = found
        self.source = path
        changes = self.world.together(lambda: self._restore(_decoded(content), path))
        return [said, *changes] if said else changes

    def initialize(self, source: str) -> list[str]:
        """Begin with the weights of `source`, a run folder or checkpoint; return sentences about what did not fit."""

        def read() -> tuple[Path, bytes]:
            path = find_checkpoint(Path(source).expanduser())
            load_checkpoint(path)  # or its sentence
            return path, path.read_bytes()

        path, content = self.world.share(self.world.by_main(read))  # type: ignore[misc]
        names = self.dataset.class_names
        return self.world.together(lambda: initialize(self.state, _decoded(content), names, path))

    def set_aside(self) -> list[str]:
        """Move what is later than the state to where nothing overwrites it; return the sentence about it.

        For a run that goes on from an earlier checkpoint: checkpoints, pictures and scores of later steps, the best
        checkpoint if it is later, and the lines of the log.
        """
        if self.source is None:
            return []
        aside, later = self.folder.set_aside(self.source, self.state.step)
        keep_lines_after(self.folder.path, self.state.step)
        return [f"what came after step {self.state.step} is kept in {aside}: {', '.join(later)}"] if later else []

    def _restore(self, content: dict[str, Any], path: Path) -> list[str]:
        config, world = self.config, self.world
        before, now = content["config"], config.to_dict()
        # An option that an older version did not have stood at its default.
        before = {**{key: getattr(TrainConfig, key, None) for key in now}, **before}
        changed = [key for key in now if key not in MAY_CHANGE and before[key] != now[key]]
        if changed:
            said = ", ".join(f"{key} (was {before[key]}, now {now[key]})" for key in changed)
            raise InputError(
                f"{path} belongs to another configuration and cannot be resumed: {said}; to begin a new run from its "
                f"weights, name a new folder: --init-from {path} --out FOLDER"
            )
        said = take_order(self.dataset, content.get("class_names", ()), f"the checkpoint {path}")
        sentences = [said] if said else []
        self.state.load_state_dict(content)
        self.guard.load_state_dict(content.get("guard", {}))
        states = content.get("ranks", [content["rng"]])
        if len(states) == world.size:
            restore_rng(states[world.rank])
        else:
            sentences.append(
                f"resumed with {counted(world.size, 'process')} instead of {len(states)}: weights, "
                "optimizers, the order of the images and the noise go on where they were; PyTorch's global random "
                "numbers start anew"
            )
        images = content.get("norm_batch", config.norm_batch(world.size))
        if images != config.norm_batch(world.size):
            sentences.append(
                f"batch norm now sees {config.norm_batch(world.size)} images at a time instead of {images}, which "
                "changes the training: set --micro-batch-size or --sync-batch-norm for as many as before"
            )
        images = content.get("images", len(self.dataset))
        if images != len(self.dataset):
            sentences.append(f"the data set has {len(self.dataset)} images instead of {images}: their order is another")
        torch_before = content["versions"].get("torch")
        if torch_before != str(torch.__version__):
            sentences.append(f"resumed with PyTorch {torch.__version__} instead of {torch_before}: not bit for bit")
        return sentences

    def roll_back(self, error: Diverged) -> str:
        """Go back to a checkpoint before `error` began, with other noise from there; return the sentence about it.

        The state of the moment is kept in stopped.pt. Raises Diverged if the run is to stop, has gone back often
        enough, or has no checkpoint.
        """
        checkpoints = self.folder.checkpoints
        stopped = checkpoints.folder / "stopped.pt"
        content = self.content()
        self.world.by_main(lambda: save_atomically(content, stopped))
        good = checkpoints.before(error.healthy_until) if self.world.is_main else None
        back = self.world.share(None if good is None else good.read_bytes())
        rollbacks = self.state.rollbacks
        if self.config.on_divergence == "stop" or rollbacks >= self.config.max_rollbacks or back is None:
            if not self.world.is_main:
                raise SystemExit(1)  # the main process says it
            after = f" after {counted(rollbacks, 'rollback')}" if rollbacks else ""
            raise Diverged(f"{error}; stopped{after}, with the state in {stopped}", error.healthy_until)
        saved = _decoded(back)
        self.state.load_state_dict(saved)
        self.guard.load_state_dict(saved.get("guard", {}))
        self.state.rollbacks = rollbacks + 1
        self.world.by_main(lambda: checkpoints.drop_after(self.state.step))
        self.save()  # or a resumed run would go on from the checkpoint that went wrong
        return (
            f"{error}; rolled back to step {self.state.step}, rollback {self.state.rollbacks} of "
            f"{self.config.max_rollbacks}, other noise"
        )

    def division(self) -> str:
        """Return a text that says how processes and micro-batches share a step's images; empty for one of each."""
        parts = self.config.micro_batches(self.world.size)
        if self.world.size == 1 and parts == 1:
            return ""
        each = self.config.batch_size // (self.world.size * parts)
        return f"{counted(self.world.size, 'process')} x {parts} x {each} images a step, "


@torch.no_grad()
def bit_sums(tensors: Iterable[torch.Tensor]) -> list[int]:
    """Return two numbers that a change of any bit of the float32 or integer `tensors` changes; one transfer."""
    sums = []
    for index, tensor in enumerate(tensors):
        bits = tensor.view(torch.int32) if tensor.dtype == torch.float32 else tensor
        sums.append(bits.sum(dtype=torch.int64) * (2 * index + 1))
    if not sums:
        return [0, 0]
    found = torch.stack(sums)
    return [int(found.sum().item()), int((found * torch.arange(1, len(sums) + 1, device=found.device)).sum().item())]


def _decoded(data: bytes) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    return content
