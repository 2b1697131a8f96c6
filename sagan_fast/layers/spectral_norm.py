"""Spectral norm as a parametrization, and all spectral-normed weights of a model as one group."""

from __future__ import annotations

import warnings
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from sagan_fast.kernels.spectral_norm import reference
from sagan_fast.ops.spectral_norm import spectral_norm_group

ModuleT = TypeVar("ModuleT", bound=nn.Module)


class _Link:
    """Says which group moves u and v of a parametrization; a deep copy of it is unlinked."""

    def __init__(self, group: SpectralNormGroup | None = None) -> None:
        self.group = group

    def __deepcopy__(self, memo: dict[int, Any]) -> _Link:
        return _Link()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Link, ()


class SpectralNorm(nn.Module):
    """Parametrization W -> W/sigma with the buffers `_u` (R,) and `_v` (K,), float32."""

    _u: Tensor
    _v: Tensor

    def __init__(
        self, weight: Tensor, n_power_iterations: int = 1, dim: int = 0, eps: float = 1e-12, warm_up: int = 15
    ) -> None:
        super().__init__()
        if n_power_iterations < 1:
            raise ValueError(
                f"spectral_norm: n_power_iterations must be positive = at least 1, got {n_power_iterations}"
            )
        self.n_power_iterations, self.dim, self.eps = n_power_iterations, dim, eps
        self.link = _Link()
        if weight.ndim > 1:
            with torch.no_grad():
                matrix = weight.movedim(dim, 0).flatten(1).float()
                R, K = matrix.shape
                u = F.normalize(matrix.new_empty(R).normal_(), dim=0, eps=eps)
                v = F.normalize(matrix.new_empty(K).normal_(), dim=0, eps=eps)
                u, v = reference.power_iteration(matrix, u, v, warm_up, eps)
            self.register_buffer("_u", u)
            self.register_buffer("_v", v)

    def forward(self, weight: Tensor) -> Tensor:
        if weight.ndim == 1:
            return F.normalize(weight, dim=0, eps=self.eps)
        group = self.link.group
        update = self.training and (group is None or group.update == "forward")
        (out,) = spectral_norm_group(
            [weight.movedim(self.dim, 0)],
            [self._u],
            [self._v],
            n_power_iterations=self.n_power_iterations,
            eps=self.eps,
            update=update,
        )
        return out.movedim(0, self.dim)

    def right_inverse(self, value: Tensor) -> Tensor:
        return value


def spectral_norm(module: ModuleT, name: str = "weight", n_power_iterations: int = 1, eps: float = 1e-12) -> ModuleT:
    """Return `module` with its parameter `name` divided by its largest singular value on every access.

    Like `torch.nn.utils.parametrizations.spectral_norm`, with the same keys in the state dict, but always in float32,
    also under autocast. u and v advance at every access in training mode and never in evaluation.
    """
    weight = getattr(module, name, None)
    if not isinstance(weight, Tensor):
        raise ValueError(f"spectral_norm: name must be a parameter of {type(module).__name__}, got {name!r}")
    transposed = isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d))
    parametrize.register_parametrization(module, name, SpectralNorm(weight, n_power_iterations, int(transposed), eps))
    return module


class SpectralNormGroup:
    """All spectral-normed weights of a model; made by `fuse_spectral_norm`."""

    def __init__(self, members: dict[str, tuple[SpectralNorm, nn.Module]], update: str) -> None:
        self.update = update
        self._members = members
        for norm, _ in members.values():
            norm.link.group = self

    @property
    def names(self) -> list[str]:
        """Names of the modules, as in `model.named_modules()`."""
        return list(self._members)

    def __len__(self) -> int:
        return len(self._members)

    @torch.no_grad()
    def step(self) -> None:
        """Advance u and v of every weight; call it once after each optimizer step."""
        for norm, parametrized in self._members.values():
            spectral_norm_group(
                [parametrized.original.movedim(norm.dim, 0)],  # type: ignore[union-attr,operator]
                [norm._u],
                [norm._v],
                n_power_iterations=norm.n_power_iterations,
                eps=norm.eps,
            )

    @torch.no_grad()
    def sigmas(self) -> dict[str, float]:
        """Return sigma of every weight by module name."""
        found = [
            reference.normalise(
                parametrized.original.movedim(norm.dim, 0).flatten(1).float(),  # type: ignore[union-attr,operator]
                norm._u.float(),
                norm._v.float(),
            )[1]
            for norm, parametrized in self._members.values()
        ]
        return dict(zip(self._members, torch.stack(found).tolist(), strict=True)) if found else {}


def fuse_spectral_norm(model: nn.Module, *, update: Literal["step", "forward"] = "step") -> SpectralNormGroup:
    """Take over every spectral-normed weight of `model`, keeping its parameters, u and v; return the group.

    With `update="step"` u and v advance only in `group.step()`; with "forward" at every training forward.
    """
    if update not in ("step", "forward"):
        raise ValueError(f"fuse_spectral_norm: update must be one of = 'step', 'forward', got {update!r}")
    members: dict[str, tuple[SpectralNorm, nn.Module]] = {}
    for module_name, module in model.named_modules():
        if not parametrize.is_parametrized(module):
            continue
        for parametrized in module.parametrizations.values():  # type: ignore[union-attr,operator]
            norm = parametrized[0]
            if isinstance(norm, parametrizations._SpectralNorm) and hasattr(norm, "_u"):
                ours = SpectralNorm(parametrized.original, norm.n_power_iterations, norm.dim, norm.eps, warm_up=0)
                ours._u, ours._v = norm._u, norm._v
                ours.train(norm.training)
                parametrized[0] = norm = ours
            if isinstance(norm, SpectralNorm) and hasattr(norm, "_u"):
                members[module_name] = norm, parametrized
    if not members:
        warnings.warn("fuse_spectral_norm found no spectral-normed weight in the model", stacklevel=2)
    return SpectralNormGroup(members, update)
