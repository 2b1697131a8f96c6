"""Reads weights of FaceBoxes from a file without running code in it, and says what is wrong with any other file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from sagan_fast.errors import InputError
from sagan_fast.files import reason

PUBLISHED = "https://github.com/zisianw/FaceBoxes.PyTorch"
"""Describes the published file: its README has the link. The same file lies in 3DDFA_V2 (cleardusk) as
FaceBoxes/weights/FaceBoxesProd.pth."""
PUBLISHED_SHA256 = "c0cb2b1e40710c0aa5fc32a8759b1496a0fe0a126c907ca0ffe35b4bd0709d09"
PUBLISHED_BYTES = 4_072_492
WHERE = f"the published FaceBoxesProd.pth is described at {PUBLISHED} (its SHA-256 is {PUBLISHED_SHA256})"


def read_weights(path: str | os.PathLike[str], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state dict in the file `path`, with the keys, shapes and dtypes of `expected`.

    A prefix "module." of all keys, which DataParallel leaves, is removed. A file of `faces train` holds the weights
    under "network". Raises InputError, in one sentence, if the file is missing or does not hold such weights.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        what = "is a folder" if file.is_dir() else "does not exist"
        raise InputError(f"the file of FaceBoxes weights {file} {what}: {WHERE}")
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle and zipfile complain about foreign bytes in many ways
        if isinstance(error, OSError):
            raise InputError(f"{file} cannot be read: {reason(error)}") from error
        raise _refused(file, "it is no file of tensors written by PyTorch") from error
    if isinstance(found, Mapping) and "network" in found:
        found = found["network"]
    if not isinstance(found, Mapping) or not found:
        raise _refused(file, "it is no state dict")
    state = {str(key).removeprefix("module."): value for key, value in found.items()}
    for key, tensor in expected.items():
        value = state.get(key)
        if not isinstance(value, Tensor):
            raise _refused(file, f"{key} is missing")
        if value.shape != tensor.shape:
            raise _refused(file, f"{key} must have the shape {tuple(tensor.shape)}, got {tuple(value.shape)}")
        if not bool(value.isfinite().all()):
            raise _refused(file, f"{key} is not finite")
    if unknown := [key for key in state if key not in expected]:
        raise _refused(file, f"{unknown[0]} is unknown")
    return {key: value.to(expected[key].dtype) for key, value in state.items()}


def _refused(file: Path, why: str) -> InputError:
    return InputError(f"{file} does not hold FaceBoxes weights ({why}): {WHERE}")
