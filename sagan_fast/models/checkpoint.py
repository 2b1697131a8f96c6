"""Reads checkpoints, and the networks in them, without running anything that they contain."""

import pickle
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from sagan_fast.errors import InputError
from sagan_fast.files import reason
from sagan_fast.models.config import DiscriminatorConfig, GeneratorConfig, network_config
from sagan_fast.models.discriminator import Discriminator
from sagan_fast.models.generator import Generator, is_exported

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
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise InputError(f"there is no checkpoint {path}") from error
    except (PermissionError, IsADirectoryError) as error:
        raise InputError(f"cannot read the checkpoint {path}: {reason(error)}") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        raise InputError(
            f"{path} is no checkpoint of sagan-fast: cut off, or holding more than plain data ({reason(error)})"
        ) from error
    missing = [key for key in KEYS if not isinstance(content, dict) or key not in content]
    if missing:
        raise InputError(f"{path} is no checkpoint of sagan-fast: it has no {', '.join(missing)}")
    if content["format"] != FORMAT:
        raise InputError(f"{path} has checkpoint format {content['format']}, this version reads {FORMAT}")
    return content


def find_checkpoint(run_or_checkpoint: Path) -> Path:
    """Return the checkpoint file meant by a run folder or a file; InputError if there is none."""
    if run_or_checkpoint.is_dir():
        path = run_or_checkpoint / "checkpoints" / "last.pt"
        if not path.exists():
            raise InputError(f"{run_or_checkpoint} has no checkpoint yet: {path} does not exist")
        return path
    if not run_or_checkpoint.exists():
        raise InputError(f"there is no run folder or checkpoint {run_or_checkpoint}")
    return run_or_checkpoint


def load_generator(run_or_checkpoint: str | Path, *, average: bool = True, device: str = "cpu") -> Generator:
    """Return the generator of a run folder, checkpoint or exported folder, in eval mode on `device`; needs no data set.

    `average` takes the averaged weights, else the last ones; they are channels_last. `Generator.config` says its
    classes and sizes. Raises InputError if there is no checkpoint, or it cannot be read.
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
    network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network.requires_grad_(False).eval()
