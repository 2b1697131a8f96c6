"""Spectral norm of a list of weights as other code bases do it, each a function that returns all W/sigma."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.shapes import Matrix
from sagan_fast.layers.spectral_norm import spectral_norm

Normalise = Callable[[], list[Tensor]]


class _Holder(nn.Module):
    """A module with nothing but a weight, so that torch's own functions have something to hook into."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.clone())

    def forward(self) -> Tensor:
        return self.weight


class Biggan(nn.Module):
    """One power iteration on the rows' side first, then W/sigma, in the order BigGAN-PyTorch's layers use."""

    def __init__(self, weight: Tensor, u: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.clone())
        self.register_buffer("u0", u[None].clone())

    def forward(self) -> Tensor:
        with torch.no_grad():
            v = F.normalize(torch.matmul(self.u0, self.weight), eps=1e-12)
            self.u0[:] = F.normalize(torch.matmul(v, self.weight.t()), eps=1e-12)
        sigma = torch.squeeze(torch.matmul(torch.matmul(v, self.weight.t()), self.u0.t()))
        return self.weight / sigma


def draw(matrices: Sequence[Matrix], device: str) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Return weights (R, K) and unit vectors u (R,), v (K,) for each of `matrices`, random, float32."""
    rng = torch.Generator(device).manual_seed(0)

    def unit(size: int) -> Tensor:
        return F.normalize(torch.randn(size, generator=rng, device=device), dim=0)

    weights = [torch.randn(m.R, m.K, generator=rng, device=device) * m.K**-0.5 for m in matrices]
    return weights, [unit(m.R) for m in matrices], [unit(m.K) for m in matrices]


def modules(kind: str, matrices: Sequence[Matrix], device: str) -> nn.ModuleList:
    """Return one module a matrix with spectral norm of `kind`: parametrization, ours, legacy or biggan."""
    weights, us, vs = draw(matrices, device)
    made = nn.ModuleList()
    for weight, u, v in zip(weights, us, vs, strict=True):
        if kind == "biggan":
            made.append(Biggan(weight, u))
            continue
        holder = _Holder(weight)
        if kind in ("parametrization", "ours"):
            (spectral_norm if kind == "ours" else nn.utils.parametrizations.spectral_norm)(holder)
            norm = holder.parametrizations["weight"][0]
            norm._u.copy_(u), norm._v.copy_(v)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                nn.utils.spectral_norm(holder)
            holder.weight_u.copy_(u), holder.weight_v.copy_(v)
        made.append(holder)
    return made.train()


def parameters(made: nn.ModuleList) -> list[nn.Parameter]:
    """Return the weights to differentiate by, in order."""
    return list(made.parameters())
