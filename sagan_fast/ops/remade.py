"""Maps that the backward pass makes again instead of keeping them, by hooks on what autograd saves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from sagan_fast.ops.library import is_plain


def can_remake() -> bool:
    """Return whether autograd saves tensors here that a hook of ours may replace, and no other hook does."""
    if is_plain() or not torch.is_grad_enabled():
        return False
    autograd: Any = torch._C._autograd
    return autograd._saved_tensors_hooks_is_enabled() and autograd._top_saved_tensors_default_hooks(True) is None


@contextmanager
def made_again(x: Tensor, make: Callable[[], Tensor] | None) -> Iterator[None]:
    """Let ops in this context keep `make` where they would keep `x`; it must return the numbers of `x`.

    Gradients of any order stay those of `x`. Without `make` nothing changes, nor for an `x` written to in the context.
    """
    if make is None:
        yield
        return
    place = _place(x)

    def pack(saved: Tensor) -> Any:
        return _Recipe(make) if _place(saved) == place else saved

    def unpack(saved: Any) -> Tensor:
        return saved.make() if isinstance(saved, _Recipe) else saved

    with saved_tensors_hooks(pack, unpack):
        yield


def avg_pool2d(x: Tensor) -> Tensor:
    """Return `F.avg_pool2d(x, 2)`. Autograd keeps the shape of `x` for it, not `x`, whose numbers no backward reads."""
    if not (x.requires_grad and can_remake()):
        return F.avg_pool2d(x, 2)
    shape, stride, dtype, device = x.shape, x.stride(), x.dtype, x.device
    with made_again(x, lambda: torch.empty_strided(shape, stride, dtype=dtype, device=device)):
        return F.avg_pool2d(x, 2)


class _Recipe:
    def __init__(self, make: Callable[[], Tensor]) -> None:
        self.make = make


def _place(x: Tensor) -> tuple[Any, ...]:
    return x.data_ptr(), x._version, x.dtype, x.shape, x.stride()
