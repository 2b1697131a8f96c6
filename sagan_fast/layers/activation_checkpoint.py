"""Activation checkpointing: what a block computes inside is computed again in the backward pass instead of kept.

Source: Chen et al. 2016, https://arxiv.org/abs/1604.06174, with PyTorch's `torch.utils.checkpoint`.
"""

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sagan_fast.layers.spectral_norm import GroupedForward
from sagan_fast.ops.library import is_transformed


def checkpointed(module: nn.Module, *inputs: Any) -> Tensor:
    """Return `module(*inputs)` and keep no more for its backward than the inputs; gradients are the same bits.

    The module may not draw random numbers. The second computation moves no running averages of batch norm, and sees
    W/sigma as it is in the backward. So everything is kept where u and v of a spectral norm move at each forward: in
    training, but for `fuse_spectral_norm(model, update="step")`. It is kept under torch.func too.
    """
    if not torch.is_grad_enabled() or is_transformed() or _moves(module):
        return module(*inputs)  # type: ignore[no-any-return]
    contexts = functools.partial(_contexts, module)
    out: Tensor = checkpoint(module, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)  # type: ignore[no-untyped-call]
    return out


def _moves(module: nn.Module) -> bool:
    norms = (norm for norm in module.modules() if isinstance(norm, GroupedForward) and norm.training)
    return any(norm.link.group is None or norm.link.group.update == "forward" for norm in norms)


def _contexts(module: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), _StatisticsKept(module)


class _StatisticsKept(AbstractContextManager[None]):
    """Batch norm moves no running averages inside, as often as it is entered: once for each order of derivative."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __enter__(self) -> None:
        self.norms = [norm for norm in self.module.modules() if isinstance(norm, nn.BatchNorm2d) and norm.training]
        self.before = [(norm.momentum, norm.num_batches_tracked) for norm in self.norms]
        for norm in self.norms:
            norm.momentum, norm.num_batches_tracked = 0.0, None

    def __exit__(self, *error: object) -> None:
        for norm, (momentum, count) in zip(self.norms, self.before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count
