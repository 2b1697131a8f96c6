"""Every launch that the shipped configs make for the standard shapes: what the report compiles and models."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

from benchmarks.shapes import BLOCK_SHAPES, SAGAN_MATRICES, BlockShape

BLOCK_DTYPES = ("bf16", "fp16", "tf32", "fp32")
MATRICES = "sagan-44-matrices"
"""Name of the spectral-norm workload in the report."""


@dataclass(frozen=True)
class Launch:
    """A plan with what it is for: the shape's name and the pass, "forward" or "backward"."""

    plan: Any
    shape: str
    part: str


def block_launches(shape: BlockShape, dtype: str, arch: int) -> list[Launch]:
    """The launches of a block's forward and backward pass in training, in order."""
    launches = []
    for op in ("projection", "attention"):
        configs = _configs(op)
        if configs is None:
            continue
        for plan in configs.plans(shape, dtype=dtype, arch=arch):
            part = "backward" if "bwd" in plan.name else "forward"
            launches.append(Launch(plan, shape.name, part))
    return launches


def spectral_norm_launches(arch: int) -> list[Launch]:
    """The launches that normalise all 44 matrices of SAGAN, forward and backward."""
    configs = _configs("spectral_norm")
    if configs is None:
        return []
    matrices = [(matrix.R, matrix.K) for matrix in SAGAN_MATRICES]
    return [
        Launch(plan, MATRICES, "backward" if "bwd" in plan.name else "forward")
        for out_dtype in ("fp32", "bf16")
        for plan in configs.plans(matrices, dtype="fp32", out_dtype=out_dtype, arch=arch)
    ]


def launches(arch: int) -> list[Launch]:
    """All launches of all ops for `arch`."""
    blocks = [
        launch for shape in BLOCK_SHAPES for dtype in BLOCK_DTYPES for launch in block_launches(shape, dtype, arch)
    ]
    return blocks + spectral_norm_launches(arch)


def _configs(op: str) -> Any:
    name = f"sagan_fast.kernels.{op}.configs"
    return importlib.import_module(name) if importlib.util.find_spec(name) else None
