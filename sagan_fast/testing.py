"""What tests and benchmarks share: error measures, tolerances by dtype, seeded random inputs."""

from __future__ import annotations

import torch
from torch import Tensor

RMS_TOLERANCE = {"fp32": 1e-5, "tf32": 2e-3, "fp16": 2e-3, "bf16": 1e-2}
"""Largest relative RMS error against float64, by precision (DESIGN §5)."""

DTYPE_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def rel_rms(actual: Tensor, truth: Tensor) -> float:
    """Return the root mean square of `actual - truth` over that of `truth`, in float64; NaN in either gives NaN."""
    actual, truth = actual.detach().double().cpu(), truth.detach().double().cpu()
    if actual.shape != truth.shape:
        raise ValueError(
            f"rel_rms: actual must have the shape of truth = {tuple(truth.shape)}, got {tuple(actual.shape)}"
        )
    if truth.numel() == 0:
        return 0.0
    error = (actual - truth).square().mean().sqrt()
    return (error / truth.square().mean().sqrt().clamp_min(torch.finfo(torch.float64).tiny)).item()


def assert_close_to_truth(
    name: str, actual: Tensor, truth: Tensor, eager: Tensor | None = None, precision: str | None = None
) -> None:
    """Assert that `actual` is as near to the float64 `truth` as DESIGN §5 asks.

    Its relative RMS error must be inside the table for `precision` (by default that of its dtype) and, where the
    same computation by plain PyTorch in the same dtype is given as `eager`, at most twice its error plus a floor of a
    tenth of the table's entry.
    """
    precision = precision or DTYPE_NAMES[actual.dtype]
    error, limit = rel_rms(actual, truth), RMS_TOLERANCE[precision]
    assert error <= limit, f"{name}: relative RMS error {error:.3g} is over {limit:.3g} ({precision})"
    if eager is not None:
        twice = 2 * rel_rms(eager, truth) + 0.1 * limit
        assert error <= twice, f"{name}: relative RMS error {error:.3g} is over twice eager's plus a floor, {twice:.3g}"


def randn(*shape: int, generator: torch.Generator, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> Tensor:
    """Return `scale` times normal random numbers of `shape` and `dtype`, drawn in float64 on the CPU."""
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)
