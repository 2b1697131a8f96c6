"""Spectral norm as a parametrization, and `fuse_spectral_norm`, which normalises all weights of a model together.

Miyato et al. 2018. Drop-in for `torch.nn.utils.parametrizations.spectral_norm`, computed in float32 always.
"""

from __future__ import annotations

import warnings
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.spectral_norm import SpectralNorm as LegacySpectralNorm

from sagan_fast.kernels.launch import accumulator_dtype
from sagan_fast.kernels.spectral_norm import reference
from sagan_fast.layers.spectral_norm_group import Link, Member, SpectralNormGroup, rows_first
from sagan_fast.ops.spectral_norm import spectral_norm_group

__all__ = ["SpectralNorm", "SpectralNormGroup", "fuse_spectral_norm", "spectral_norm"]

ModuleT = TypeVar("ModuleT", bound=nn.Module)

_WARM_UP_ITERATIONS = 15  # as torch's parametrization


class SpectralNorm(nn.Module):
    """Parametrization W -> W/sigma with the buffers `_u` (R,) and `_v` (K,), float32 (float64 for a float64 weight).

    In a group it returns the group's W/sigma; alone, and in a deep copy of a fused model, it updates u and v at every
    access in training mode. A weight of one axis is divided by its length.
    """

    _u: Tensor
    _v: Tensor

    def __init__(self, weight: Tensor, n_power_iterations: int = 1, dim: int = 0, eps: float = 1e-12) -> None:
        super().__init__()
        if n_power_iterations < 1:
            raise ValueError(f"spectral_norm: n_power_iterations must be at least 1, got {n_power_iterations}")
        self.n_power_iterations, self.dim, self.eps = n_power_iterations, dim, eps
        self.link = Link()
        if weight.ndim > 1:
            with torch.no_grad():
                matrix = rows_first(weight.detach(), dim).flatten(1).to(accumulator_dtype(weight.dtype))
                R, K = matrix.shape
                u, v = matrix.new_empty(R).normal_(), matrix.new_empty(K).normal_()
                if not weight.is_meta:  # a weight without values, soon to be loaded, has nothing to iterate on
                    u, v = F.normalize(u, dim=0, eps=eps), F.normalize(v, dim=0, eps=eps)
                    u, v = reference.power_iteration(matrix, u, v, _WARM_UP_ITERATIONS, eps)
            self.register_buffer("_u", u)
            self.register_buffer("_v", v)

    @classmethod
    def taking_over(cls, theirs: Any) -> SpectralNorm:
        """Return our equivalent of torch's parametrization `theirs`, with the same u and v."""
        ours = cls(theirs._u, theirs.n_power_iterations, theirs.dim, theirs.eps)  # of one axis: no u and v are drawn
        ours.register_buffer("_u", theirs._u)
        ours.register_buffer("_v", theirs._v)
        return ours.train(theirs.training)

    def forward(self, weight: Tensor) -> Tensor:
        if weight.ndim == 1:
            return F.normalize(weight, dim=0, eps=self.eps)
        shared = self.link.normalised(weight)
        if shared is not None:
            return shared
        (out,) = spectral_norm_group(
            [rows_first(weight, self.dim)],
            [self._u],
            [self._v],
            n_power_iterations=self.n_power_iterations,
            eps=self.eps,
            update=self.link.updates(self.training),
        )
        return out.movedim(0, self.dim) if self.dim else out

    def right_inverse(self, value: Tensor) -> Tensor:
        return value


def spectral_norm(module: ModuleT, name: str = "weight", n_power_iterations: int = 1, eps: float = 1e-12) -> ModuleT:
    """Return `module` with its parameter `name` divided by its largest singular value on every access.

    Like `torch.nn.utils.parametrizations.spectral_norm`: the same keys in the state dict
    (`parametrizations.weight.original`, `parametrizations.weight.0._u`, `._v`), 15 iterations to start with, rows along
    the output channels; u and v are updated at every access in training and never in evaluation. Unlike it, always in
    float32, also under autocast and for half-precision weights.

    Raises ValueError if `module` has no such parameter.
    """
    weight = getattr(module, name, None)
    if not isinstance(weight, Tensor):
        raise ValueError(f"spectral_norm: name must be a parameter of {type(module).__name__}, got {name!r}")
    transposed = isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d))
    parametrize.register_parametrization(module, name, SpectralNorm(weight, n_power_iterations, int(transposed), eps))
    return module


class _LegacyHook(LegacySpectralNorm):
    """torch's older forward pre-hook, which sets the module's weight, here to the group's W/sigma."""

    def __init__(self, theirs: LegacySpectralNorm) -> None:
        super().__init__(theirs.name, theirs.n_power_iterations, theirs.dim, theirs.eps)
        self.link = Link()

    def compute_weight(self, module: nn.Module, do_power_iteration: bool) -> Tensor:
        weight = getattr(module, self.name + "_orig")
        shared = self.link.normalised(weight)
        if shared is not None:
            return shared
        with torch.autocast(weight.device.type, enabled=False):
            return super().compute_weight(module, self.link.updates(do_power_iteration))

    def remove(self, module: nn.Module) -> None:
        super().remove(module)
        weight = getattr(module, self.name)
        weight.data = weight.data.clone()  # its memory is the group's


class _BigGANWeight:
    """Replaces the method `W_` of a BigGAN-PyTorch layer (layers.py, class SN) and returns the group's W/sigma.

    The layer keeps only u. v = Wᵀu/|Wᵀu| is computed again when something else changed u, such as a loaded checkpoint.
    """

    def __init__(self, module: Any) -> None:
        self.module, self.dim = module, int(getattr(module, "transpose", False))
        self.n_power_iterations, self.eps = getattr(module, "num_itrs", 1), getattr(module, "eps", 1e-12)
        self.link = Link()
        self.u_version = -1

    def __call__(self) -> Tensor:
        shared = self.link.normalised(self.module.weight)
        return type(self.module).W_(self.module) if shared is None else shared

    def prepare(self) -> None:
        u0 = self.module.u0
        if u0._version != self.u_version:
            matrix = rows_first(self.module.weight.detach(), self.dim).flatten(1).float()
            self.module.sagan_fast_v.copy_(F.normalize(torch.mv(matrix.t(), u0[0].float()), dim=0, eps=self.eps))
            self.after_step()

    def after_step(self) -> None:
        self.u_version = self.module.u0._version


def _parametrized(name: str, module: nn.Module) -> list[Member]:
    """Return the spectral-normed weights of a module with parametrizations, ours and torch's, which become ours."""
    members = []
    for tensor_name, chain in module.parametrizations.items():  # type: ignore[union-attr,operator]
        norm = chain[0]
        if any(isinstance(later, (SpectralNorm, parametrizations._SpectralNorm)) for later in list(chain)[1:]):
            said = f"fuse_spectral_norm skips {name}.{tensor_name}: another parametrization comes first"
            warnings.warn(said, stacklevel=3)
        if isinstance(norm, parametrizations._SpectralNorm) and hasattr(norm, "_u"):
            chain[0] = norm = SpectralNorm.taking_over(norm)
        if not isinstance(norm, SpectralNorm) or not hasattr(norm, "_u"):
            continue

        def is_alive(norm: SpectralNorm = norm, tensor_name: str = tensor_name) -> bool:
            chains = getattr(module, "parametrizations", {})
            return tensor_name in chains and chains[tensor_name][0] is norm

        whose = _name(name, tensor_name)
        members.append(Member(whose, norm, (chain, "original"), (norm, "_u"), (norm, "_v"), False, is_alive))
    return members


def _legacy(name: str, module: nn.Module) -> list[Member]:
    """Return the weights of a module that torch's older hook normalises; ours takes the hook's place."""
    members = []
    for key, hook in module._forward_pre_hooks.items():
        if not isinstance(hook, LegacySpectralNorm):
            continue
        if not isinstance(hook, _LegacyHook):
            module._forward_pre_hooks[key] = hook = _LegacyHook(hook)

        def is_alive(key: int = key, hook: _LegacyHook = hook) -> bool:
            return module._forward_pre_hooks.get(key) is hook

        weight_at, u_at, v_at = ((module, hook.name + end) for end in ("_orig", "_u", "_v"))
        members.append(Member(_name(name, hook.name), hook, weight_at, u_at, v_at, True, is_alive))
    return members


def _biggan(name: str, module: Any) -> list[Member]:
    """Return the weight of a BigGAN-PyTorch layer, whose method `W_` ours replaces."""
    if not (callable(getattr(module, "W_", None)) and hasattr(module, "u0") and hasattr(module, "sv0")):
        return []
    if getattr(module, "num_svs", 1) != 1:
        warnings.warn(f"fuse_spectral_norm skips {name}: it keeps {module.num_svs} singular values", stacklevel=3)
        return []
    ours = module.__dict__.get("W_")
    if not isinstance(ours, _BigGANWeight):
        ours = _BigGANWeight(module)
        columns = module.weight.numel() // module.u0.numel()
        module.register_buffer("sagan_fast_v", module.u0.new_zeros(columns, dtype=torch.float32), persistent=False)
        module.W_ = ours
    weight_at, u_at, v_at, sigma_at = ((module, each) for each in ("weight", "u0", "sagan_fast_v", "sv0"))
    return [
        Member(
            _name(name, "weight"), ours, weight_at, u_at, v_at, True,
            prepare=ours.prepare, after_step=ours.after_step, sigma_at=sigma_at,
        )
    ]  # fmt: skip


def _name(module_name: str, tensor_name: str) -> str:
    return (f"{module_name}.{tensor_name}".removesuffix(".weight") or "weight").lstrip(".")


def group_of(module: nn.Module) -> SpectralNormGroup | None:
    """Return the group that normalises a weight through `module` itself, or None."""
    holders = [module, *module._forward_pre_hooks.values(), module.__dict__.get("W_")]
    links = (holder.link for holder in holders if isinstance(holder, (SpectralNorm, _LegacyHook, _BigGANWeight)))
    return next((link.group for link in links if link.group is not None), None)


def fuse_spectral_norm(
    model: nn.Module, *, update: Literal["step", "forward"] = "step", backend: str = "auto"
) -> SpectralNormGroup:
    """Take over every spectral-normed weight of `model` in place; return the group that normalises them in one pass.

    It takes over our parametrization, torch's (`parametrizations.spectral_norm`), torch's older hook
    (`torch.nn.utils.spectral_norm`) and layers like BigGAN-PyTorch's (buffers `u0`, `sv0`, method `W_`). Parameters
    stay the same objects, u and v stay as they are, and the keys of the state dict do not change.

    With `update="step"` u and v move only in `group.step()`, to be called after each optimizer step; between two steps
    every access, in training and evaluation, sees the same W/sigma, computed once. With "forward" they move
    together at every forward of `model` in training mode. They never move in evaluation. A weight changed by anything
    else (a loaded checkpoint, `.to()`) is noticed at its next access and normalised again, with u and v as they are.

    A deep copy of the model is not fused: it normalises weight by weight, and moves u and v at its own training
    forwards. Inside `torch.compile` weights are normalised one by one as well, with u and v under the same policy.

    `backend` as in `functional.spectral_norm_group`. Raises ValueError for another `update`.
    """
    if update not in ("step", "forward"):
        raise ValueError(f"fuse_spectral_norm: update must be 'step' or 'forward', got {update!r}")
    members = []
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module):
            members += _parametrized(name, module)
        members += _legacy(name, module)
        members += _biggan(name, module)
    if not members:
        warnings.warn("fuse_spectral_norm found no spectral-normed weight in the model", stacklevel=2)
    for former in {member.norm.link.group for member in members}:
        if former is not None:
            former.release()
    group = SpectralNormGroup(members, update, backend)
    if update == "forward":
        hook = Link(group).before_forward
        group.release = model.register_forward_pre_hook(hook).remove  # type: ignore[method-assign]
    return group
