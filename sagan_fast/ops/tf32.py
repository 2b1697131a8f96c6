"""Whether float32 products and convolutions on CUDA may round their inputs to TF32, for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Within it matrix products and convolutions in float32 on CUDA are TF32, or, not `allowed`, IEEE; then as before.

    It goes through PyTorch's older settings, which set `fp32_precision` too. The other way round the two differ, and
    then `torch.get_float32_matmul_precision`, `torch.backends.cudnn.flags` and `allow_tf32` raise RuntimeError for
    whoever reads them: FlexAttention, autotuning, a user's own code (pytorch#166387).
    """
    backends: Any = torch.backends
    matmul, cpu, cudnn = backends.cuda.matmul, backends.mkldnn.matmul, backends.cudnn
    places = (matmul, cpu, cudnn.conv, cudnn.rnn)
    before = [place.fp32_precision for place in places]
    products, convolutions = "high" if before[0] == "tf32" else "highest", before[2] == "tf32"
    with suppress(RuntimeError):  # where somebody has left the two different
        products = torch.get_float32_matmul_precision()
    with suppress(RuntimeError):
        convolutions = cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    cudnn.allow_tf32 = allowed
    if allowed and before[1] in ("none", "ieee"):  # of the CPU's products nothing was said
        cpu.fp32_precision = before[1]
    if not allowed and "tf32" in (cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision):  # from all backends' setting
        cudnn.conv.fp32_precision = cudnn.rnn.fp32_precision = "ieee"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(products)
        cudnn.allow_tf32 = convolutions
        for place, said in zip(places, before, strict=True):
            if place.fp32_precision != said:
                place.fp32_precision = said
