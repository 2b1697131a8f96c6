"""W/sigma for a list of weights, with the power iteration of spectral norm (Miyato et al. 2018, algorithm 1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sagan_fast.kernels.spectral_norm import reference


def spectral_norm_group(
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    *,
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    update: bool = True,
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> list[Tensor]:
    """Return W/sigma for each of `weights`, with the shape of the weight and `out_dtype` (by default its own dtype).

    A weight (R, ...) is taken as the matrix (R, K); `us` (R,) and `vs` (K,) are advanced in place by
    `n_power_iterations` when `update`, and are constants in the gradient. Computed in float32, also under autocast
    and for half-precision weights.
    """
    outs = []
    for weight, u, v in zip(weights, us, vs, strict=True):
        with torch.autocast(weight.device.type, enabled=False):
            matrix = weight.flatten(1).float()
            if update:
                with torch.no_grad():
                    for old, new in zip(
                        (u, v),
                        reference.power_iteration(matrix, u.float(), v.float(), n_power_iterations, eps),
                        strict=True,
                    ):
                        old.copy_(new)
            # Clones, so that the next update does not spoil the backward of this call.
            normalised, _ = reference.normalise(matrix, u.float().clone(), v.float().clone())
            outs.append(normalised.view(weight.shape).to(out_dtype or weight.dtype))
    return outs
