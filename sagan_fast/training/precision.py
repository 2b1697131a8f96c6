"""The precision of a run: autocast, loss scaling, TF32. Weights, spectral norm and losses stay float32."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor

from sagan_fast.errors import InputError
from sagan_fast.kernels.launch import DTYPES
from sagan_fast.ops.tf32 import tf32


class Precision:
    """The precision `name` on `device`: "auto" is bf16 on CUDA devices that have it, fp32 elsewhere.

    fp32 means IEEE products; tf32 lets the tensor cores round the inputs of float32 products; bf16 and fp16 are
    autocast, fp16 with one loss scaler a network. Raises InputError where the device does not have it.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        on_cuda = device.type == "cuda"
        has_bf16 = on_cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        if name == "auto":
            name = "bf16" if has_bf16 else "fp32"
        if name == "bf16" and on_cuda and not has_bf16:
            raise InputError(f"precision bf16 was asked for, but {torch.cuda.get_device_name(device)} does not have it")
        if name in ("tf32", "fp16") and not on_cuda:
            raise InputError(f"precision {name} needs a CUDA device, and this run is on {device}")
        self.name, self.device = name, device

    def products(self) -> AbstractContextManager[None]:
        """Return a context where float32 products and convolutions on CUDA are IEEE for fp32, else TF32."""
        return tf32(self.name != "fp32")

    def autocast(self) -> torch.autocast:
        """Return the context for the forward passes."""
        enabled = self.name in ("bf16", "fp16")
        return torch.autocast(self.device.type, dtype=DTYPES[self.name] if enabled else torch.bfloat16, enabled=enabled)

    @property
    def product_dtype(self) -> torch.dtype:
        """The dtype that products of the networks are computed in."""
        return DTYPES.get(self.name, torch.float32)

    def scaler(self) -> Scaler:
        """Return a loss scaler for one network: it scales under fp16 and does nothing otherwise."""
        return Scaler(self.device.type, enabled=self.name == "fp16")


class Scaler(torch.amp.GradScaler):
    """A GradScaler that does a whole update and counts the steps it skipped, without waiting for the device."""

    def __init__(self, device: str, enabled: bool) -> None:
        super().__init__(device, enabled=enabled)
        self._skipped: int | Tensor = 0

    @property
    def skipped(self) -> int:
        """Number of steps skipped so far because a gradient overflowed; waits for the device under fp16."""
        return int(self._skipped)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of the scalar `loss`, scaled under fp16."""
        self.scale(loss).backward()  # type: ignore[no-untyped-call]

    def update(self, optimizer: torch.optim.Optimizer) -> Tensor:  # type: ignore[override]
        """Let `optimizer` step unless a gradient overflowed under fp16; return the norm of the gradient, a scalar.

        The norm of a gradient that overflowed under fp16 is given as 0: that step is counted as skipped instead.
        """
        self.unscale_(optimizer)
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
        self.step(optimizer)
        if self.is_enabled():
            overflowed = torch.stack(list(self._found_inf_per_device(optimizer).values())).amax() > 0
            self._skipped = self._skipped + overflowed
            norm = torch.where(overflowed, 0.0, norm)
            super().update()
        return norm

    def state_dict(self) -> dict[str, float]:
        """Return the scale and its growth, empty unless scaling, and the number of steps skipped."""
        return {**super().state_dict(), "skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """Take over what `state_dict` returned."""
        state = dict(state_dict)
        self._skipped = int(state.pop("skipped", 0))
        if self.is_enabled():
            super().load_state_dict(state)
