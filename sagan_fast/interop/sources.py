"""Reads checkpoints of other code bases as tensors by name; nothing in a file is run."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from sagan_fast.errors import InputError
from sagan_fast.files import reason

Network = Literal["generator", "discriminator"]
Source = str | Path | Mapping[str, Any] | nn.Module

_AVERAGED = ("generator_ema", "G_ema", "g_ema", "G_ema_state_dict", "ema")
_NAMES = {
    "generator": ("generator", "G", "G_state_dict", "netG", "g"),
    "discriminator": ("discriminator", "D", "D_state_dict", "netD", "d"),
}
"""What a checkpoint of several networks calls each of them."""

_OPTIMIZER = re.compile(r"(^|/)(global_step|beta[12]_power|.*/(Adam(_\d+)?|RMSProp(_\d+)?|ExponentialMovingAverage))$")


_SCALAR = np.float64(0).__reduce__()[0]
_NUMPY_SCALARS: list[Any] = [
    np.dtype, *(type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8", "?")),
    (_SCALAR, "numpy.core.multiarray.scalar"), (_SCALAR, "numpy._core.multiarray.scalar"),
]  # fmt: skip
"""What the pickle of a NumPy number calls: none of it runs code of the file."""


def read_source(source: Source, network: Network, ema: bool) -> dict[str, Tensor]:
    """Return the tensors of `network` in `source`, on the CPU, floats in float32, by their names in that network.

    `source` is a file, a state dict or a module. A file is .npz with TensorFlow's variable names, .safetensors, or what
    `torch.save` wrote, which is read with `weights_only=True`. Of a checkpoint with several networks `network` is
    taken, with `ema` its averaged generator if it has one. Raises InputError for what cannot be read, would run code,
    or does not hold the network.
    """
    name = str(source) if isinstance(source, (str, Path)) else "the state dict"
    content: Any = source.state_dict() if isinstance(source, nn.Module) else source
    if isinstance(source, (str, Path)):
        content = _read_file(Path(source))
    found = _network(content, network, ema, name)
    arrays = {key: value for key, value in found.items() if isinstance(value, (Tensor, np.ndarray))}
    if not arrays:
        raise InputError(f"{name} holds no tensors of a {network}")
    return {key: _tensor(value) for key, value in arrays.items()}


def _read_file(path: Path) -> Any:
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return dict(arrays)
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        with torch.serialization.safe_globals(_NUMPY_SCALARS):  # such as the best FID, beside the weights
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise InputError(f"there is no file {path}") from error
    except pickle.UnpicklingError as error:
        said = (
            "it holds more than tensors and plain values, which would run code" if "Unsupported" in str(error) else ""
        )
        raise InputError(f"{path} cannot be read: {said or reason(error)}") from error
    except (RuntimeError, EOFError, ValueError, KeyError, OSError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} cannot be read: {reason(error)}") from error
    except Exception as error:  # safetensors has an exception of its own
        raise InputError(f"{path} cannot be read: {error}") from error


def _network(content: Any, network: Network, ema: bool, name: str) -> dict[str, Any]:
    """Return the state dict of `network` in `content`, found by the usual names of such dictionaries and prefixes."""
    averaged = _AVERAGED if ema and network == "generator" else ()
    names = (*averaged, *_NAMES[network])
    while isinstance(content, Mapping) and not any(isinstance(v, (Tensor, np.ndarray)) for v in content.values()):
        inner = next((content[key] for key in (*names, "state_dict", "model") if key in content), None)
        if not isinstance(inner, Mapping):
            break
        content = inner
    if not isinstance(content, Mapping):
        raise InputError(f"{name} must hold a state dict, got {type(content).__name__}")
    found = {str(key).removesuffix(":0"): value for key, value in content.items()}
    if any("/" in key for key in found):
        return _tensorflow(found, network)
    while found and all(key.startswith("module.") for key in found):
        found = {key.removeprefix("module."): value for key, value in found.items()}
    for prefix in names:
        if any(key.startswith(f"{prefix}.") for key in found):
            whole = {key.partition(".")[2]: v for key, v in found.items() if key.startswith(f"{prefix}.")}
            return {key.removeprefix("module."): value for key, value in whole.items()}
    return found


def _tensorflow(found: dict[str, Any], network: Network) -> dict[str, Any]:
    """Return the variables of `network` from the part that starts with g_ or d_, without those of optimizers."""
    kept = {}
    for key, value in found.items():
        parts = key.split("/")
        start = next((i for i, part in enumerate(parts) if re.match(r"[gd]_", part)), None)
        if _OPTIMIZER.search(key) or (start is not None and not parts[start].startswith(f"{network[0]}_")):
            continue
        kept["/".join(parts[start or 0 :])] = value
    return kept


def _tensor(value: Tensor | np.ndarray[Any, Any]) -> Tensor:
    tensor = value.detach().cpu() if isinstance(value, Tensor) else torch.from_numpy(np.array(value))
    return tensor.float() if tensor.is_floating_point() else tensor
