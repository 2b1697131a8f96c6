"""Spectral norm as a parametrization, and `fuse_spectral_norm`, which normalises all weights of a model together.

Miyato et al. 2018. Drop-in for `torch.nn.utils.parametrizations.spectral_norm`, computed in float32 always.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from sagan_fast.kernels.launch import accumulator_dtype
from sagan_fast.kernels.spectral_norm import reference
from sagan_fast.layers.foreign_spectral_norm import Holder, LegacyHook, foreign_norms, unrecognised
from sagan_fast.layers.instance_class import change_class, restore_class
from sagan_fast.layers.spectral_norm_group import SpectralNormGroup
from sagan_fast.layers.spectral_norm_member import Link, Member, rows_first
from sagan_fast.ops.spectral_norm import spectral_norm_group

__all__ = ["SpectralNorm", "SpectralNormGroup", "fuse_spectral_norm", "spectral_norm"]

ModuleT = TypeVar("ModuleT", bound=nn.Module)

_WARM_UP_ITERATIONS = 15  # as torch's parametrization


class GroupedForward:
    """The forward of our parametrization; in front of the class of torch's it makes that one ours, u and v kept."""

    link: Link

    def forward(self: Any, weight: Tensor) -> Tensor:
        if weight.ndim == 1:
            return F.normalize(weight, dim=0, eps=self.eps)
        shared = self.link.normalised(weight, self.training)
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


class SpectralNorm(GroupedForward, nn.Module):
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
                u, v = matrix.new_empty(R), matrix.new_empty(K)
                # A weight without values, soon to be loaded, has nothing to iterate on; and `normal_` on the meta
                # device imports all of Dynamo, which takes over a second (PyTorch 2.14.1).
                if not weight.is_meta:
                    u, v = F.normalize(u.normal_(), dim=0, eps=eps), F.normalize(v.normal_(), dim=0, eps=eps)
                    u, v = reference.power_iteration(matrix, u, v, _WARM_UP_ITERATIONS, eps)
            self.register_buffer("_u", u)
            self.register_buffer("_v", v)

    def right_inverse(self, value: Tensor) -> Tensor:
        return value


def spectral_norm(
    module: ModuleT, name: str = "weight", n_power_iterations: int = 1, eps: float = 1e-12, dim: int | None = None
) -> ModuleT:
    """Return `module` with its parameter `name` divided by its largest singular value on every access.

    Like `torch.nn.utils.parametrizations.spectral_norm`: the same keys in the state dict
    (`parametrizations.weight.original`, `parametrizations.weight.0._u`, `._v`), 15 iterations to start with, rows along
    the axis `dim`, by default that of the output channels; u and v are updated at every access in training and never
    in evaluation. Unlike it, always in float32, also under autocast and for half-precision weights.

    Raises ValueError if `module` has no such parameter.
    """
    weight = getattr(module, name, None)
    if not isinstance(weight, Tensor):
        raise ValueError(f"spectral_norm: name must be a parameter of {type(module).__name__}, got {name!r}")
    if dim is None:
        dim = int(isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)))
    parametrize.register_parametrization(module, name, SpectralNorm(weight, n_power_iterations, dim, eps))
    return module


def _parametrized(name: str, module: nn.Module, say: Callable[[str], None]) -> Iterator[Member]:
    """Yield the spectral-normed weights of a module with parametrizations, ours and torch's, which become ours."""
    for tensor_name, chain in module.parametrizations.items():  # type: ignore[union-attr,operator]
        norm: Any = chain[0]
        if any(isinstance(later, (GroupedForward, parametrizations._SpectralNorm)) for later in list(chain)[1:]):
            say(f"{name}.{tensor_name}: another parametrization comes first")
        if not isinstance(norm, (GroupedForward, parametrizations._SpectralNorm)) or not hasattr(norm, "_u"):
            continue
        if not isinstance(norm, GroupedForward):
            change_class(norm, GroupedForward)
            norm.link = Link()  # type: ignore[assignment]

        def is_alive(norm: Any = norm, tensor_name: str = tensor_name) -> bool:
            chains = getattr(module, "parametrizations", {})
            return tensor_name in chains and chains[tensor_name][0] is norm

        def undo(norm: Any = norm) -> None:
            if not isinstance(norm, SpectralNorm):
                restore_class(norm)
                del norm.link

        whose = (f"{name}.{tensor_name}".removesuffix(".weight") or "weight").lstrip(".")
        yield Member(whose, cast(Any, norm), (chain, "original"), (norm, "_u"), (norm, "_v"), False, is_alive, undo)


def _inside(model: nn.Module, name: str, is_alive: Callable[[], bool]) -> Callable[[], bool]:
    """Return `is_alive`, but False once the module `name` or one above it was replaced in `model`."""
    links, module = [], model
    for key in name.split(".") if name else ():
        links.append((module._modules, key, module._modules[key]))
        module = module._modules[key]  # type: ignore[assignment]
    return lambda: all(children.get(key) is child for children, key, child in links) and is_alive()


def group_of(module: nn.Module) -> SpectralNormGroup | None:
    """Return the group that normalises a weight through `module` itself, or None."""
    hooks = module._forward_pre_hooks.values()
    holders = [module, *hooks, *(getattr(each, "_spectral_norm_holder", None) for each in (module, *hooks))]
    links = (holder.link for holder in holders if isinstance(holder, (GroupedForward, LegacyHook, Holder)))
    return next((link.group for link in links if link.group is not None), None)


def fuse_spectral_norm(
    model: nn.Module, *, update: Literal["step", "forward"] = "step", backend: str = "auto"
) -> SpectralNormGroup:
    """Take over every spectral-normed weight of `model` in place; return the group that normalises them in one pass.

    It takes over our parametrization and torch's (`parametrizations.spectral_norm`), torch's older hook
    (`torch.nn.utils.spectral_norm`), layers like those of BigGAN-PyTorch, mmgeneration and mimicry, and the wrappers
    and hooks of older repositories (layers/foreign_spectral_norm.py). Parameters stay the same objects, u and v stay
    as they are, and the keys of the state dict do not change. A warning names what looks spectral-normed and is not
    taken over.

    With `update="step"` u and v move only in `group.step()`, to be called after each optimizer step; between two steps
    every access sees the same W/sigma, computed once. Before the first step they move once, at the first access in
    training, as the unfused model's do. So one forward a step gives what the unfused model gives. With "forward" u
    and v move at every use of a weight in training, exactly as in the unfused model, those of a forward of `model` in
    one pass. No group moves them in evaluation; layers that do so themselves (all but torch's and ours) then run
    their own code. A weight changed by anything else (a loaded checkpoint, `.to()`) is noticed at its next access and
    normalised again, with u and v as they are; for writes through `.data` see `SpectralNormGroup.refresh`.

    A deep copy of the model is not fused: it normalises weight by weight, and moves u and v at its own training
    forwards. So do replicas of `nn.DataParallel`. Inside `torch.compile` weights are normalised one by one as well,
    with u and v under the same policy.

    `backend` as in `functional.spectral_norm_group`. Raises ValueError for another `update`.
    """
    return group_members(model, update, backend)


def group_members(
    model: nn.Module, update: str, backend: str, wanted: Callable[[str], bool] = lambda name: True
) -> SpectralNormGroup:
    """Do as `fuse_spectral_norm` with the modules whose name is `wanted`."""
    if update not in ("step", "forward"):
        raise ValueError(f"fuse_spectral_norm: update must be 'step' or 'forward', got {update!r}")
    members, taken = [], set()
    skipped: list[str] = []
    for name, module in model.named_modules():
        if not wanted(name):
            taken.add(id(module))
            continue
        found = list(_parametrized(name, module, skipped.append)) if parametrize.is_parametrized(module) else []
        for member in (*found, *(make() for _, make in foreign_norms(name, module, skipped.append))):
            member.is_alive = _inside(model, name, member.is_alive)
            members.append(member)
            taken |= {id(module), id(member.weight_at[0])}
        if skipped and skipped[-1].startswith(f"{name}:"):
            taken.add(id(module))
    for said in skipped:
        warnings.warn(f"fuse_spectral_norm skips {said}", stacklevel=3)
    if unknown := unrecognised(model, taken):
        warnings.warn(f"fuse_spectral_norm does not know the spectral norm of {', '.join(unknown)}", stacklevel=3)
    if not members:
        warnings.warn("fuse_spectral_norm found no spectral-normed weight in the model", stacklevel=3)
    formers = {member.norm.link.group for member in members} - {None}
    group = SpectralNormGroup(members, update, backend)
    group.started = bool(formers) and all(former.started for former in formers)
    for former in formers:
        former.release()
    link = Link()
    link.group = group
    while isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        model = model.module  # a forward of the wrapper calls its own or replicas of it
    group.release = model.register_forward_pre_hook(link.before_forward).remove
    return group
