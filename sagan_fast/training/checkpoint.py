"""Writing checkpoints: whole or not at all. Reading them is models/checkpoint.py's."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from sagan_fast.errors import InputError


def save_atomically(content: dict[str, Any], path: Path) -> None:
    """Write `content` (tensors, numbers, strings, lists, dictionaries) to `path`: after a crash the old file stands.

    A temporary file beside it is written, flushed to the disk and renamed. Raises InputError if the folder cannot be
    written or the disk is full; the old file is untouched.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = Path(file.name)
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except (OSError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).split("\n")[0]
        raise InputError(f"cannot write the checkpoint {path}: {reason}; the one before it is untouched") from error
    finally:
        if temporary is not None:
            with contextlib.suppress(FileNotFoundError):
                temporary.unlink()


def rng_state() -> dict[str, Any]:
    """Return the states of PyTorch's global generators, for what a run does not draw from (seed, step) itself."""
    state: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def restore_rng(state: dict[str, Any]) -> None:
    """Set PyTorch's global generators to what `rng_state` returned, the devices' where they are as many."""
    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_available() and len(state.get("cuda", ())) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
