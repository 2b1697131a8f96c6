"""How near a result is to float64, and how near it has to be."""

import torch
from torch import Tensor

from sagan_fast.kernels.launch import DTYPES

RMS_TOLERANCE = {"fp32": 1e-5, "tf32": 2e-3, "fp16": 2e-3, "bf16": 1e-2}
"""Largest relative RMS error against float64, by precision (DESIGN §5)."""

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items() if name != "tf32"}


def rel_rms(actual: Tensor, truth: Tensor) -> float:
    """Return the root mean square of `actual - truth` over that of `truth`, in float64; NaN in either gives NaN."""
    actual, truth = actual.detach().double(), truth.detach().to(actual.device, torch.float64)
    if actual.shape != truth.shape:
        raise ValueError(f"rel_rms: actual must have shape {tuple(truth.shape)} of truth, got {tuple(actual.shape)}")
    if truth.numel() == 0:
        return 0.0
    error = (actual - truth).square().mean().sqrt()
    return (error / truth.square().mean().sqrt().clamp_min(torch.finfo(torch.float64).tiny)).item()
