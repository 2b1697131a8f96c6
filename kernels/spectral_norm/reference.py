"""One power iteration, sigma and W/sigma of one matrix in plain PyTorch, and the gradient: the truth of the kernels.

Miyato et al. 2018, algorithm 1, in the order of `torch.nn.utils.parametrizations.spectral_norm`: u = Wv/|Wv|, then
v = Wᵀu/|Wᵀu|, sigma = uᵀWv. u and v are constants in the gradient: dW = (G - <G, W/sigma> u vᵀ)/sigma.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .tables import SMALLEST_NORM


def power_iteration(
    weight: Tensor, u: Tensor, v: Tensor, n_power_iterations: int = 1, eps: float = 1e-12
) -> tuple[Tensor, Tensor]:
    """Return u (R,) and v (K,), updated `n_power_iterations` times for `weight` (R, K); nothing is changed in place.

    Lengths below `eps` are taken as `eps`. u and v stay where a length is 0 or not finite: from zeros, which torch's
    spectral norm would keep, there is no way back once the weight is good again.
    """
    for _ in range(n_power_iterations):
        new_u = F.normalize(torch.mv(weight, v), dim=0, eps=eps)
        new_v = F.normalize(torch.mv(weight.T, new_u), dim=0, eps=eps)
        norms = torch.stack([torch.linalg.vector_norm(new_u), torch.linalg.vector_norm(new_v)])
        moves = ((norms > 0) & norms.isfinite()).all()
        u, v = torch.where(moves, new_u, u), torch.where(moves, new_v, v)
    return u, v


def normalise(weight: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return W/sigma (R, K) and sigma = uᵀWv, a scalar, for `weight` (R, K), `u` (R,), `v` (K,)."""
    sigma = torch.vdot(u, torch.mv(weight, v))
    return weight / sigma, sigma


def normalise_backward(grad: Tensor, weight: Tensor, u: Tensor, v: Tensor, sigma: Tensor) -> Tensor:
    """Return dW = (G - <G, W/sigma> u vᵀ)/sigma, (R, K), for `grad` G (R, K) of W/sigma."""
    return (grad - torch.sum(grad * weight) / sigma * torch.outer(u, v)) / sigma


def norm_of_update(
    update: Tensor, u: Tensor, v: Tensor, v_first: bool = False, smallest: float = SMALLEST_NORM
) -> tuple[Tensor, Tensor, Tensor]:
    """Return sigma, u (R,) and v (K,) after one power iteration for `update` X (R, K), in either order.

    Where |Xv| (with `v_first` |Xᵀu|), or sigma, is below `smallest` or not finite, u and v are those given, and sigma
    is that number.
    """
    matrix = update.T if v_first else update
    first = torch.mv(matrix, u if v_first else v)
    norm = torch.linalg.vector_norm(first)
    if smallest <= norm < torch.inf:
        second = torch.mv(matrix.T, first / norm)
        sigma = torch.linalg.vector_norm(second)
        if smallest <= sigma < torch.inf:
            return (sigma, second / sigma, first / norm) if v_first else (sigma, first / norm, second / sigma)
        norm = sigma
    return norm, u, v
