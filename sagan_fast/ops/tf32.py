"""Whether float32 products and convolutions on CUDA may round their inputs to TF32, for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Within it matrix products and convolutions in float32 on CUDA are TF32, or, not `allowed`, IEEE; then as before.

    It goes through `allow_tf32`, which sets `fp32_precision` too. The other way round the two differ, and then
    `torch.get_float32_matmul_precision`, `torch.backends.cudnn.flags` and `allow_tf32` itself raise RuntimeError for
    whoever reads them: FlexAttention, autotuning, a user's own code (pytorch#166387).
    """
    backends: Any = torch.backends
    owners = (backends.cuda.matmul, backends.cudnn)
    precisions = (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn)
    before = [_allows(owner, precision) for owner, precision in zip(owners, precisions, strict=False)]
    precise = [precision.fp32_precision for precision in precisions]
    for owner in owners:
        owner.allow_tf32 = allowed
    try:
        yield
    finally:
        for owner, was in zip(owners, before, strict=True):
            owner.allow_tf32 = was
        for precision, said in zip(precisions, precise, strict=True):
            if precision.fp32_precision != said:
                precision.fp32_precision = said


def _allows(owner: Any, precision: Any) -> bool:
    try:
        return bool(owner.allow_tf32)
    except RuntimeError:  # set through fp32_precision by somebody else
        return bool(precision.fp32_precision == "tf32")
