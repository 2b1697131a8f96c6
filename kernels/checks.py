"""Argument checks shared by all launchers; every message says what was expected and what was given."""

from collections.abc import Sequence

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check_shape(op: str, argument: str, tensor: Tensor, expected: Sequence[int], letters: str) -> None:
    """Raise ValueError unless `tensor` has the shape `expected`, whose axes are called `letters` ("B, N, D_QK")."""
    if tuple(tensor.shape) != tuple(expected):
        raise ValueError(f"{op}: {argument} must have shape ({letters}) = {tuple(expected)}, got {tuple(tensor.shape)}")


def check_ndim(op: str, argument: str, tensor: Tensor, letters: str) -> None:
    """Raise ValueError unless `tensor` has one axis for each of `letters` ("B, C, H, W")."""
    ndim = letters.count(",") + 1
    if tensor.ndim != ndim:
        raise ValueError(f"{op}: {argument} must have {ndim} axes ({letters}), got shape {tuple(tensor.shape)}")


def check_dtype(op: str, argument: str, tensor: Tensor, expected: Sequence[torch.dtype]) -> None:
    """Raise TypeError unless the dtype of `tensor` is one of `expected`."""
    if tensor.dtype not in expected:
        names = " or ".join(str(dtype) for dtype in expected)
        raise TypeError(f"{op}: {argument} must have dtype {names}, got {tensor.dtype}")


def check_contiguous(op: str, names: Sequence[str], tensors: Sequence[Tensor | None]) -> None:
    """Raise ValueError unless all of `tensors` that are not None are contiguous: kernels are not told their strides."""
    for name, tensor in zip(names, tensors, strict=True):
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"{op}: {name} must be contiguous, got strides {tensor.stride()}")


def check_same_device(op: str, first_name: str, first: Tensor, **others: Tensor | None) -> None:
    """Raise ValueError unless all of `others` that are not None are on the device of `first`."""
    for name, tensor in others.items():
        if tensor is not None and tensor.device != first.device:
            raise ValueError(f"{op}: {name} must be on the device of {first_name}, {first.device}, got {tensor.device}")


def is_autocast_on(device: torch.device) -> bool:
    """Return whether autocast is on for `device`; never for devices that have none (meta), where PyTorch raises."""
    kind = device.type
    return (kind in ("cuda", "cpu") or torch.amp.is_autocast_available(kind)) and torch.is_autocast_enabled(kind)
