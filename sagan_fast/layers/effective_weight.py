"""The weight that a 1x1 convolution uses, whatever normalises it: for a caller that convolves in its place."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.utils.spectral_norm import SpectralNorm as LegacySpectralNorm

from sagan_fast.layers.foreign_spectral_norm import is_hook_with_u_alone, is_wrapper, method_of

_FORWARDS = (nn.Conv2d.forward, nn.Conv1d.forward)


def is_direct(conv: Any) -> bool:
    """Return whether `conv(x)` is the 1x1 convolution of x with `weight_now(conv, x)` and its bias, and no more.

    It is not where other hooks than a spectral norm's want to see the call, or an unknown forward computes the result.
    """
    if conv._forward_hooks or conv._backward_hooks or conv._backward_pre_hooks:
        return False
    for hook in conv._forward_pre_hooks.values():
        if not isinstance(hook, LegacySpectralNorm) and not is_hook_with_u_alone(hook, conv):
            return False
    if type(conv).forward not in _FORWARDS or "forward" in conv.__dict__:
        if is_wrapper(conv):
            return is_direct(conv.module)
        if method_of(conv) is None or "forward" in conv.__dict__:
            return False
    return is_pointwise(conv)


def is_pointwise(conv: Any) -> bool:
    """Return whether `conv` has a 1x1 kernel, no stride, no padding and no groups."""
    return set(conv.kernel_size) == {1} and set(conv.stride) == {1} and not _padding(conv) and conv.groups == 1


def _padding(conv: Any) -> bool:
    return conv.padding not in ("valid", "same") and any(conv.padding)


def weight_now(conv: Any, x: Tensor) -> Tensor:
    """Return the weight that a direct `conv` would use for `x` now, of its own shape: its spectral norm runs."""
    for hook in conv._forward_pre_hooks.values():
        hook(conv, (x,))
    if type(conv).forward in _FORWARDS:
        return conv.weight  # type: ignore[no-any-return]
    if (method := method_of(conv)) is not None:
        return getattr(conv, method)()  # type: ignore[no-any-return]
    conv._update_u_v()
    return weight_now(conv.module, x)


def bias_of(conv: Any) -> Tensor | None:
    """Return the bias of a direct `conv`."""
    try:
        return conv.bias  # type: ignore[no-any-return]
    except AttributeError:
        return conv.module.bias  # type: ignore[no-any-return]
