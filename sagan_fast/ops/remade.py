"""Lets the op behind a batch norm compute what it got again in its backward pass, instead of keeping it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sagan_fast.ops import batch_norm
from sagan_fast.ops.library import is_executed, is_plain


class Remade(NamedTuple):
    """What an op keeps in place of the result of `fused_batch_norm`, to compute it again in its own backward pass.

    `tensors` are those that batch norm keeps, to be saved by that op too. `node` is the one of batch norm in the graph.
    """

    node: Any
    tensors: tuple[Tensor | None, ...]

    def result(self, tensors: Sequence[Tensor | None], links: bool) -> Tensor:
        """Return the result from the saved `tensors`; if it `links`, with the graph of the inputs of batch norm.

        Without, batch norm's own backward takes the same tensor, if this backward pass reaches it.
        """
        x, gain, bias, y, mean, var = tensors
        assert x is not None and mean is not None and var is not None
        options = self.node.options
        if links:
            with torch.autocast(x.device.type, enabled=False):
                return batch_norm.plain(x, gain, bias, y, *batch_norm.fixed_statistics(mean, var, options), options)
        with torch.no_grad():
            out = batch_norm.output(x, mean, var, gain, bias, y, options)
        if not torch.compiler.is_compiling() and is_executed(self.node):
            self.node.result = out
        return out


def remade(out: Tensor) -> Remade | None:
    """Return what replaces `out`, if `fused_batch_norm` returned it with `Options.remakes`; else None."""
    if is_plain():
        return None
    node: Any = out.grad_fn
    if getattr(type(node), "_forward_cls", None) is not batch_norm.BatchNormFunction:
        return None
    return Remade(node, node.saved_tensors[:6]) if node.options.remakes and node.options.backend == "cpu" else None
