"""softmax(scale q kᵀ) v in plain PyTorch, the map in memory: the truth the kernels are held against.

Formula: Zhang et al. 2019, eq. 1-2 (no 1/sqrt(d) in SAGAN, so `scale` is 1). Differentiable any number of times; in
float64 it is the oracle of the tests, in lower precision the `eager` backend.
"""

import torch
from torch import Tensor

from ..checks import is_autocast_on


def _is_half(x: Tensor) -> bool:
    """Return whether products with `x` are computed in float16."""
    if is_autocast_on(x.device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type) == torch.float16
    return x.dtype == torch.float16


def attention_map(q: Tensor, k: Tensor, scale: float = 1.0) -> Tensor:
    """Return beta = softmax(scale q kᵀ) over keys, (B, N, M), from `q` (B, N, D_QK) and `k` (B, M, D_QK).

    For float16, also autocast's, scores and beta are float32, as in the kernels.
    """
    if _is_half(q):  # whose largest number, 65,504, scores may exceed
        with torch.autocast(q.device.type, enabled=False):
            return torch.softmax(torch.bmm(q.float(), k.float().transpose(1, 2)) * scale, dim=-1)
    logits = torch.bmm(q, k.transpose(1, 2))
    return torch.softmax(logits if scale == 1.0 else logits * scale, dim=-1)


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float = 1.0) -> Tensor:
    """Return softmax(scale q kᵀ) v, (B, N, D_V), from `q` (B, N, D_QK), `k` (B, M, D_QK), `v` (B, M, D_V)."""
    beta = attention_map(q, k, scale)
    return torch.bmm(beta if beta.dtype == v.dtype else beta.to(v.dtype), v)  # autocast's softmax returns float32
