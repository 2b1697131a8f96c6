"""Which backend runs an attention, and why."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

BACKENDS = ("auto", "eager", "sdpa", "triton")

# On the CPU fused attention, with q and k padded to D_V, pays from this many scores (B * N * M: the map no longer fits
# the caches) and keys on; below, the map in memory is faster. Measured: docs/log.md, "Attention on the CPU".
CPU_FUSED_MIN_SCORES = 2**22
CPU_FUSED_MIN_KEYS = 256

_logger = logging.getLogger("sagan_fast")


@dataclass(frozen=True)
class Choice:
    """The backend that runs ("eager", "sdpa" or "triton") and the reason in a few words."""

    backend: str
    reason: str

    def __str__(self) -> str:
        return f"{self.backend} ({self.reason})"


def triton_refusal(device: torch.device, dtype: torch.dtype, D_QK: int, D_V: int) -> str | None:
    """Return why the Triton kernels cannot run here on these sizes, or None where they can."""
    return "this version has no Triton kernel for attention"


def choose(op: str, backend: str, like: Tensor, B: int, N: int, M: int, D_QK: int, D_V: int) -> Choice:
    """Return the backend that runs `op` on the device and dtype of `like`, with B images of N queries and M keys.

    Raises ValueError for a name that is not in `BACKENDS`, RuntimeError if "triton" was asked for and cannot run:
    an explicit choice is never replaced by another.
    """
    if backend not in BACKENDS:
        raise ValueError(f"{op}: backend must be one of = {BACKENDS}, got {backend!r}")
    if backend == "triton":
        refusal = triton_refusal(like.device, like.dtype, D_QK, D_V)
        if refusal is not None:
            raise RuntimeError(f"{op}: backend must be able to run here = 'sdpa' or 'eager', got 'triton': {refusal}")
        return Choice("triton", "asked for")
    if backend != "auto":
        return Choice(backend, "asked for")
    choice = _automatic(like, B, N, M, D_QK, D_V)
    if not torch.compiler.is_compiling() and _logger.isEnabledFor(logging.DEBUG):
        _logger.debug("%s: %s", op, choice)
    return choice


def _automatic(like: Tensor, B: int, N: int, M: int, D_QK: int, D_V: int) -> Choice:
    if like.device.type == "cuda":
        refusal = triton_refusal(like.device, like.dtype, D_QK, D_V)
        if refusal is None:
            return Choice("triton", f"{like.device} and {like.dtype} are supported")
        return Choice("sdpa", f"not triton: {refusal}")
    sizes = f"{B} maps of {N} x {M}"
    if like.device.type == "cpu" and (B * N * M < CPU_FUSED_MIN_SCORES or M < CPU_FUSED_MIN_KEYS):
        return Choice("eager", f"{sizes} are small: on the CPU they are faster in memory")
    return Choice("sdpa", f"{sizes} stay out of memory with fused attention")
