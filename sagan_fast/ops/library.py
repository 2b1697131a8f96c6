"""PyTorch's library of our ops: opaque to torch.compile, differentiated by the functions around them."""

from typing import Any

import torch
from torch.autograd import forward_ad

LIBRARY = torch.library.Library("sagan_fast", "FRAGMENT")  # type: ignore[no-untyped-call]


def define(schema: str) -> None:
    """Define an op of `LIBRARY` that keeps the strides of its inputs under torch.compile."""
    tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
    LIBRARY.define(schema, tags=tags)  # type: ignore[no-untyped-call]


def is_transformed() -> bool:
    """Return whether a transform of `torch.func`, or forward-mode AD, is at work: a plain call would lose tangents."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_plain() -> bool:
    """Return whether a transform or a compiler is at work, for which every backend computes in plain PyTorch."""
    return (
        torch.compiler.is_compiling()
        or torch.compiler.is_exporting()
        or torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
        or is_transformed()
    )


def is_executed(node: Any) -> bool:
    """Return whether the backward pass that runs will execute `node`, of the graph; True where PyTorch does not say."""
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:  # it does not say it of parameters in autograd.grad, nor outside of a backward pass
        return True


def packs_saved_tensors() -> bool:
    """Return whether hooks pack what autograd saves here, as in activation checkpointing."""
    autograd: Any = torch._C._autograd
    return autograd._top_saved_tensors_default_hooks(True) is not None
