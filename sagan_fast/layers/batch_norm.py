"""Batch norm modules run by our kernels, with the gains of their caller and the ReLU in the same op."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from sagan_fast.layers.effective_weight import is_watched
from sagan_fast.layers.synced_batch_norm import SyncedBatchNorm2d, of_all
from sagan_fast.ops.backends import choose_batch_norm
from sagan_fast.ops.batch_norm import Options, Sync, fused_batch_norm
from sagan_fast.ops.library import is_plain, packs_saved_tensors

_OP = "batch_norm_relu"


def batch_norm_relu(norm: nn.BatchNorm2d, x: Tensor, backend: str = "auto", remakes: bool = False) -> Tensor:
    """Return ReLU(norm(x)), (B, C, H, W) in the dtype of `x`; `backend` as in `functional.conditional_batch_norm`."""
    out = fused(norm, x, norm.weight, norm.bias, relu=True, backend=backend, remakes=remakes)
    return F.relu(norm(x)) if out is None else out


def fused(
    norm: nn.BatchNorm2d, x: Tensor, gain: Tensor | None, bias: Tensor | None, y: Tensor | None = None,
    *, relu: bool = False, one_plus: bool = False, backend: str = "auto", remakes: bool = False,
) -> Tensor | None:  # fmt: skip
    """Return gain * normalised x + bias, or its ReLU, by our kernels; None where they do not run here.

    `norm` gives the statistics, and its running averages move as in its own forward, over all processes for a
    `SyncedBatchNorm2d`; its own gain and bias are left out. `gain`, `bias`, classes `y` and `one_plus` are as in
    `functional.conditional_batch_norm`, `remakes` as in `ops.batch_norm.Options`. The result is None where
    `fused_backend` is, and for tables of another length.
    """
    chosen = fused_backend(norm, x, backend)
    rows = y if y is not None else gain if gain is not None and gain.ndim == 2 else None
    if chosen is None or (rows is not None and len(rows) != len(x)):
        return None
    training = norm.training or norm.running_mean is None
    sync = Sync(of_all, dist.all_reduce) if _is_synced(norm) else None
    momentum = norm.momentum or 0.0
    if norm.training and norm.track_running_stats and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:
            momentum = 1.0 / float(norm.num_batches_tracked)
    moves = not norm.training or norm.track_running_stats
    running = (norm.running_mean, norm.running_var) if moves else (None, None)
    # Others' statistics are not at hand in backward, autocast rounds a convolution's input, and activation
    # checkpointing lets what is saved be read once.
    remakes = remakes and sync is None and not (torch.is_autocast_enabled("cpu") or packs_saved_tensors())
    options = Options(training, momentum, norm.eps, relu, one_plus, sync, chosen, remakes)
    return fused_batch_norm(x, gain, bias, y, *running, options)


def fused_backend(norm: nn.BatchNorm2d, x: Tensor, backend: str = "auto") -> str | None:
    """Return the backend by which `fused` computes `norm` of `x`, "triton" or "cpu"; None where `norm` does so itself.

    That is where no kernel runs, with hooks on `norm`, in a subclass of another's, and where its own forward would
    raise an error.
    """
    chosen = "eager" if is_plain() else choose_batch_norm(_OP, backend, x).backend
    if chosen == "eager" or type(norm) not in (nn.BatchNorm2d, SyncedBatchNorm2d) or is_watched(norm):
        return None
    if x.ndim != 4 or x.shape[1] != norm.num_features:
        return None
    if _is_synced(norm):
        return None if norm.momentum is None else chosen
    single = x.numel() == x.shape[1] and (norm.training or norm.running_mean is None)
    return None if single else chosen


def _is_synced(norm: nn.BatchNorm2d) -> bool:
    return type(norm) is SyncedBatchNorm2d and norm.training and dist.is_initialized()
