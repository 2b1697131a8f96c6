"""Reads checkpoints, and the networks in them, without running anything that they contain."""

import re
import warnings
import zipfile
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from sagan_fast.errors import InputError
from sagan_fast.files import RUN, check_exists, reason
from sagan_fast.models.config import DiscriminatorConfig, GeneratorConfig, network_config
from sagan_fast.models.discriminator import Discriminator
from sagan_fast.models.generator import Generator, is_exported, memory_format_on

Network = TypeVar("Network", bound=nn.Module)

FORMAT = 1
KEYS = (
    "format", "step", "config", "generator", "ema", "discriminator", "g_spectral", "d_spectral", "g_optimizer",
    "d_optimizer", "g_scaler", "d_scaler", "rng", "versions",
)  # fmt: skip


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Return the content of the checkpoint `path`, on the CPU, read with `weights_only=True`.

    Raises InputError if it is missing, cut off, holds more than plain data, or is no checkpoint of ours.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what the file may be instead: that is said below
            content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise InputError(f"there is no checkpoint {path}") from error
    except (PermissionError, IsADirectoryError) as error:
        raise InputError(f"cannot read the checkpoint {path}: {reason(error)}") from error
    except Exception as error:  # PyTorch's reader meets bytes of other files with nearly every kind of exception
        what = kind_of(path) or f"cut off, or holding more than plain data ({reason(error)})"
        raise InputError(f"{path} is no checkpoint of sagan-fast: {what}") from error
    missing = [key for key in KEYS if not isinstance(content, dict) or key not in content]
    if missing:
        raise InputError(f"{path} is no checkpoint of sagan-fast: it has no {', '.join(missing)}")
    if content["format"] != FORMAT:
        raise InputError(f"{path} has checkpoint format {content['format']}, this version reads {FORMAT}")
    return content


_OF_RUN = re.compile(r"last\.pt|step-\d+\.pt")
_BEGINNINGS = {
    b"\x89PNG": "a PNG image", b"\xff\xd8\xff": "a JPEG image", b"GIF8": "a GIF", b"\x93NUMPY": "a NumPy array",
    b"\x1f\x8b": "a gzip archive",
}  # fmt: skip
_ENDINGS = {
    ".onnx": "an ONNX model", ".safetensors": "weights without a configuration", ".npz": "NumPy arrays",
    ".yaml": "a configuration", ".json": "a JSON file", ".jsonl": "a log",
}  # fmt: skip


def kind_of(path: Path) -> str:
    """Return in words what the file `path` is instead of a checkpoint, by its first bytes and its name; "" if unknown.

    The words say also what to give instead.
    """
    with path.open("rb") as file:
        first = file.read(8)
    what = next((name for start, name in _BEGINNINGS.items() if first.startswith(start)), "")
    what = what or _ENDINGS.get(path.suffix.lower(), "")
    if not what and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        what = "a TorchScript model" if any(name.endswith("/constants.pkl") for name in names) else ""
    return f"it is {what}; give a run folder, or a .pt file of its checkpoints/" if what else ""


def is_whole(path: Path) -> bool:
    """Return whether the file `path` is there and has the end that `torch.save` writes: it was not cut off."""
    return path.is_file() and zipfile.is_zipfile(path)


def checkpoints_of(run: Path) -> list[Path]:
    """Return the whole checkpoints of the run folder `run`, the newest first; best.pt comes last.

    The first is last.pt, or what is newer: a crash may have come between writing a checkpoint and naming it last.pt.
    """
    folder = run / "checkpoints"
    last = folder / "last.pt"
    steps = [path for path in sorted(folder.glob("step-*.pt"), reverse=True) if is_whole(path)]
    if is_whole(last):
        same = next((i for i, path in enumerate(steps) if path.samefile(last)), None)
        if same is None:  # a copy, where the file system has no links
            steps.insert(0, last)
        else:
            steps[same] = last
    return [*steps, *(path for path in [folder / "best.pt"] if is_whole(path))]


def holds_checkpoints(run: Path) -> bool:
    """Return whether the folder `run` holds a checkpoint of a run, be it whole or not."""
    folder = run / "checkpoints"
    return any(path.name == "best.pt" or _OF_RUN.fullmatch(path.name) for path in folder.glob("*.pt"))


def find_checkpoint(run_or_checkpoint: Path) -> Path:
    """Return the checkpoint file meant by a run folder, its newest whole one, or by a file; InputError without any."""
    if run_or_checkpoint.is_dir():
        if found := checkpoints_of(run_or_checkpoint):
            return found[0]
        last = run_or_checkpoint / "checkpoints" / "last.pt"
        if last.exists():
            return last  # for the sentence that loading it gives
        if (run_or_checkpoint / "config.yaml").exists() or last.parent.is_dir():
            raise InputError(f"{run_or_checkpoint} has no checkpoint yet: {last} does not exist")
        raise InputError(f"{run_or_checkpoint} is no run folder: there is no {last}")
    check_exists(run_or_checkpoint, RUN)
    return run_or_checkpoint


def load_generator(run_or_checkpoint: str | Path, *, average: bool = True, device: str = "cpu") -> Generator:
    """Return the generator of a run folder, checkpoint or exported folder, in eval mode on `device`; needs no data set.

    `average` takes the averaged weights, else the last ones; they are in `memory_format_on(device)`. `Generator.config`
    says its classes and sizes. Raises InputError if there is no checkpoint, or it cannot be read.
    """
    path = Path(run_or_checkpoint)
    if is_exported(path):
        if not average:
            raise InputError(f"{path} is an exported generator: the last weights are in the checkpoint only")
        return Generator.from_pretrained(path, device=device)
    content = load_checkpoint(find_checkpoint(path))
    generator = Generator(network_config(GeneratorConfig, content["config"], "generator", backend="auto"))
    generator.class_names = tuple(str(name) for name in content.get("class_names", ()))  # of the data set it learned
    return _with_weights(generator, content["ema" if average else "generator"], path, device)


def load_discriminator(run_or_checkpoint: str | Path, *, device: str = "cpu") -> Discriminator:
    """Return the discriminator of a run folder or checkpoint, in eval mode on `device`.

    Raises InputError if there is no checkpoint, or it cannot be read; exported folders hold no discriminator.
    """
    path = Path(run_or_checkpoint)
    if is_exported(path):
        raise InputError(f"{path} is an exported generator: the discriminator is in the checkpoint only")
    content = load_checkpoint(find_checkpoint(path))
    config = network_config(DiscriminatorConfig, content["config"], "discriminator", backend="auto")
    return _with_weights(Discriminator(config), content["discriminator"], path, device)


def _with_weights(network: Network, weights: dict[str, Any], path: Path, device: str) -> Network:
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise InputError(f"{path}: the weights do not fit its configuration ({error})") from error
    network.to(device, memory_format=memory_format_on(device))  # type: ignore[call-overload]
    return network.requires_grad_(False).eval()
