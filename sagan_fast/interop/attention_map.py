"""An attention map that is computed only if somebody uses it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

_KNOWN_WITHOUT_VALUES = {
    torch.Tensor.shape.__get__,  # type: ignore[attr-defined]
    torch.Tensor.dtype.__get__,  # type: ignore[attr-defined]
    torch.Tensor.device.__get__,  # type: ignore[attr-defined]
    torch.Tensor.ndim.__get__,  # type: ignore[attr-defined]
    torch.Tensor.size,
    torch.Tensor.dim,
    torch.Tensor.numel,
    torch.Tensor.__len__,
}


class LazyMap(Tensor):
    """A tensor of `shape` in the dtype and on the device of `like`, whose values come from `compute` at the first use.

    It can be used like any tensor: every operation gets the values, gradients included.
    """

    _compute: Callable[[], Tensor] | None
    _value: Tensor | None

    @staticmethod
    def __new__(cls, compute: Callable[[], Tensor], shape: tuple[int, ...], like: Tensor) -> LazyMap:
        made: Any = Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device)  # type: ignore[attr-defined]
        made._compute, made._value = compute, None
        return made

    def __init__(self, *_: Any) -> None:
        pass

    @property
    def is_computed(self) -> bool:
        """Whether the values exist."""
        return self._value is not None

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _KNOWN_WITHOUT_VALUES:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        return func(*tree_map(_value_of, args), **tree_map(_value_of, kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return func(*tree_map(_value_of, args), **tree_map(_value_of, kwargs or {}))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _value_of(self).__reduce_ex__(protocol)

    def __deepcopy__(self, memo: Any) -> Tensor:
        return _value_of(self).detach().clone()


def _value_of(x: Any) -> Any:
    if not isinstance(x, LazyMap):
        return x
    if x._value is None:
        assert x._compute is not None
        x._value, x._compute = x._compute(), None
    return x._value
