"""The weight that a 1x1 convolution uses, whatever normalises it: for a caller that convolves in its place."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from sagan_fast.layers.foreign_spectral_norm import is_spectral_norm_hook, is_wrapper, method_of

_FORWARDS = (nn.Conv2d.forward, nn.Conv1d.forward)
_ONES, _NO_PADDING = ((1, 1), (1,)), ((0, 0), (0,), "valid", "same")


def is_direct(conv: Any) -> bool:
    """Return whether `conv(x)` is the 1x1 convolution of x with `weight_now(conv)` and its bias, and no more.

    It is not where other hooks than a spectral norm's want to see the call, or an unknown forward computes the result.
    """
    if has_hooks(conv):
        return False
    if type(conv).forward not in _FORWARDS or "forward" in conv.__dict__:
        if is_wrapper(conv):
            return is_direct(conv.module)
        if method_of(conv) is None or "forward" in conv.__dict__:
            return False
    return is_pointwise(conv)


def has_hooks(module: Any) -> bool:
    """Return whether `module` has hooks other than those of a spectral norm."""
    if module._forward_hooks or module._backward_hooks or module._backward_pre_hooks:
        return True
    pre = module._forward_pre_hooks
    return bool(pre) and not all(is_spectral_norm_hook(hook, module) for hook in pre.values())


def is_watched(module: Any) -> bool:
    """Return whether somebody may see what `module` is given or returns: by its hooks, or by those of all modules."""
    every = nn.modules.module
    return has_hooks(module) or bool(
        every._global_forward_hooks
        or every._global_forward_pre_hooks
        or every._global_backward_hooks
        or every._global_backward_pre_hooks
    )


def is_pointwise(conv: Any) -> bool:
    """Return whether `conv` has a 1x1 kernel, no stride, no padding and no groups."""
    return (
        conv.kernel_size in _ONES and conv.stride in _ONES and conv.padding in _NO_PADDING and conv.groups == 1
    )  # fmt: skip


def weight_now(conv: Any) -> Tensor:
    """Return the weight that a direct `conv`, or another layer, would use now: its spectral norm runs."""
    for hook in conv._forward_pre_hooks.values():
        if is_spectral_norm_hook(hook, conv):
            hook(conv, ())
    if type(conv).forward in _FORWARDS:
        return conv.weight  # type: ignore[no-any-return]
    if (method := method_of(conv)) is not None:
        return getattr(conv, method)()  # type: ignore[no-any-return]
    if not is_wrapper(conv):
        return conv.weight  # type: ignore[no-any-return]
    conv._update_u_v()
    return weight_now(conv.module)


def bias_of(conv: Any) -> Tensor | None:
    """Return the bias of a direct `conv`."""
    try:
        return conv.bias  # type: ignore[no-any-return]
    except AttributeError:
        return conv.module.bias  # type: ignore[no-any-return]
