"""Keeps the 4x4 weights of a folded convolution: they are made once for each version of the 3x3 ones."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sagan_fast.layers.effective_weight import is_watched
from sagan_fast.ops.library import is_plain
from sagan_fast.ops.resized_conv import Direction, folded


class _Made(NamedTuple):
    """What was made of `source`, at its `version`; `linked` is in the graph of the weight `owner`, if there is one."""

    source: Tensor
    version: int
    value: Tensor
    owner: weakref.ref[Tensor] | None = None
    linked: Tensor | None = None


class FoldedWeight:
    """`get(weight)` returns `folded(weight, direction)`, the same tensor as long as `weight` is the same.

    Same means: the object of the call before, or one that shares its memory (W/sigma of a group with and without a
    graph), at the same version. A parameter is folded at every call, for writes through `.data` leave its version.
    So are weights under a transform, while compiling, in inference mode, and on other devices than the CPU, where the
    replay of a graph changes memory unseen. Copies start empty.
    """

    def __init__(self, direction: Direction) -> None:
        self.direction = direction
        self._made: _Made | None = None  # read and replaced as a whole: replicas of DataParallel share this object

    def __deepcopy__(self, memo: dict[int, Any]) -> FoldedWeight:
        return FoldedWeight(self.direction)

    def __reduce__(self) -> tuple[Any, ...]:
        return FoldedWeight, (self.direction,)

    def get(self, weight: Tensor) -> Tensor:
        """Return the 4x4 weights of `weight` (O, I, 3, 3)."""
        if not _can_be_kept(weight):
            return folded(weight, self.direction)
        made, links = self._made, torch.is_grad_enabled() and weight.requires_grad
        if made is None or not _is_same(made, weight):
            with torch.inference_mode(False), torch.no_grad():
                value = folded(weight.detach(), self.direction)
            made = _Made(weight.detach(), weight._version, value)
        if links and (made.owner is None or made.owner() is not weight):
            linked = folded(weight, self.direction, made.value)
            made = made._replace(owner=weakref.ref(weight), linked=linked)
        self._made = made
        out = made.linked if links else made.value
        assert out is not None
        return out


def _can_be_kept(weight: Tensor) -> bool:
    # no nn.Parameter
    return not is_plain() and type(weight) is Tensor and weight.device.type == "cpu" and not weight.is_inference()


def _is_same(made: _Made, weight: Tensor) -> bool:
    # the source shares the version, and is alive: its memory is no other tensor's
    return weight._version == made.source._version == made.version and _place(made.source) == _place(weight)


def _place(weight: Tensor) -> tuple[Any, ...]:
    return weight.data_ptr(), weight.dtype, weight.shape, weight.stride()


def is_foldable(conv: nn.Conv2d) -> bool:
    """Return whether `conv` is a plain 3x3 convolution of padding 1 that nobody watches."""
    return (
        all(getattr(type(conv), name) is getattr(nn.Conv2d, name) for name in ("forward", "_conv_forward", "__call__"))
        and "forward" not in conv.__dict__
        and "_conv_forward" not in conv.__dict__
        and not conv._forward_pre_hooks
        and not is_watched(conv)
        and (conv.kernel_size, conv.stride, conv.padding, conv.dilation) == ((3, 3), (1, 1), (1, 1), (1, 1))
        and (conv.groups, conv.padding_mode) == (1, "zeros")
    )
