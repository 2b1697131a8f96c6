"""The spectral norms of other code bases, as members of a group: recognised by attributes, never by import.

Each keeps its parameters, buffers and keys. What normalises the weight gets another class, which asks the group in
training. In evaluation those that iterate there too, all but torch's, do so themselves as before.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.spectral_norm import SpectralNorm as LegacySpectralNorm

from sagan_fast.layers.instance_class import change_class, restore_class
from sagan_fast.layers.spectral_norm_member import Link, Member

METHODS = {
    "W_": ("u0", "sv0", "num_itrs"),  # BigGAN-PyTorch, layers.py
    "sn_weight": ("u0", "sv0", "num_iters"),  # mmgeneration, biggan_snmodule.py
    "sn_weights": ("sn_u", "sn_sigma", "num_iters"),  # mimicry, spectral_norm.py
}
"""Methods that return W/sigma, with the names of u (1, R), of the logged sigma and of the number of iterations."""


class Holder:
    """What a group knows of a weight normalised by a method, a wrapper or a hook of others."""

    def __init__(self, dim: int, n_power_iterations: int, eps: float) -> None:
        self.link, self.dim, self.n_power_iterations, self.eps = Link(), dim, n_power_iterations, eps


class LegacyHook(LegacySpectralNorm):
    """torch's older forward pre-hook, which sets the module's weight, here to the group's W/sigma."""

    def __init__(self, theirs: LegacySpectralNorm) -> None:
        super().__init__(theirs.name, theirs.n_power_iterations, theirs.dim, theirs.eps)
        self.theirs, self.link = theirs, Link()

    def compute_weight(self, module: nn.Module, do_power_iteration: bool) -> Tensor:
        weight = getattr(module, self.name + "_orig")
        shared = self.link.normalised(weight, do_power_iteration)
        if shared is not None:
            return shared
        with torch.autocast(weight.device.type, enabled=False):
            return super().compute_weight(module, self.link.updates(do_power_iteration))

    def remove(self, module: nn.Module) -> None:
        super().remove(module)
        own_memory(module, self.name)


def own_memory(module: nn.Module, name: str) -> None:
    """Copy the tensor `name` of `module`, whose memory is a group's."""
    weight = getattr(module, name)
    if isinstance(weight, nn.Parameter):
        weight.data = weight.data.clone()
    else:
        setattr(module, name, weight.detach().clone())


def _fused(module: Any, original: Callable[[], Tensor]) -> Tensor:
    """Return the group's W/sigma in training, else what `original` returns."""
    link: Link = module._spectral_norm_holder.link
    if not module.training:
        return original()
    shared = link.normalised(module.weight, True)
    if shared is not None or link.updates(True):
        return original() if shared is None else shared
    module.training = False  # u must stay where it is
    try:
        return original()
    finally:
        module.training = True


class _FusedW:
    def W_(self) -> Tensor:  # noqa: N802
        return _fused(self, super().W_)  # type: ignore[misc]


class _FusedWeight:
    def sn_weight(self) -> Tensor:
        return _fused(self, super().sn_weight)  # type: ignore[misc]


class _FusedWeights:
    def sn_weights(self) -> Tensor:
        return _fused(self, super().sn_weights)  # type: ignore[misc]


class _FusedWrapper:
    """Of a module that wraps another and sets its weight before each forward (christiancosgrove, heykeetae)."""

    def _update_u_v(self: Any) -> None:
        name, link = self.name, self._spectral_norm_holder.link
        shared = link.normalised(getattr(self.module, name + "_bar"), True) if self.training else None
        if shared is None:
            super()._update_u_v()  # type: ignore[misc]
        else:
            setattr(self.module, name, shared)


class _FusedHook:
    """Of a forward pre-hook that keeps u alone and sets a buffer (rosinality)."""

    def __call__(self: Any, module: nn.Module, inputs: Any) -> Any:
        link = self._spectral_norm_holder.link
        shared = link.normalised(getattr(module, self.name + "_orig"), True) if module.training else None
        if shared is None:
            return super().__call__(module, inputs)  # type: ignore[misc]
        return setattr(module, self.name, shared)


_OVERRIDING = {"W_": _FusedW, "sn_weight": _FusedWeight, "sn_weights": _FusedWeights}


def method_of(module: nn.Module) -> str | None:
    """Return the name of the method by which `module` returns W/sigma, or None."""
    for name, (u, sigma, _) in METHODS.items():
        if callable(getattr(module, name, None)) and u in module._buffers and sigma in module._buffers:
            return name
    return None


def is_wrapper(module: Any) -> bool:
    """Return whether `module` wraps another one, whose weight it normalises before each forward."""
    inner, name = module._modules.get("module"), getattr(module, "name", None)
    return inner is not None and callable(getattr(module, "_update_u_v", None)) and hasattr(inner, f"{name}_bar")


def is_hook_with_u_alone(hook: Any, module: nn.Module) -> bool:
    """Return whether `hook`, a forward pre-hook of `module`, keeps u alone and sets the weight as a buffer."""
    name = getattr(hook, "name", None)
    if not callable(getattr(hook, "compute_weight", None)) or f"{name}_u" not in module._buffers:
        return False
    return f"{name}_v" not in module._buffers and hasattr(module, f"{name}_orig")


def is_spectral_norm_hook(hook: Any, module: nn.Module) -> bool:
    """Return whether `hook`, a forward pre-hook of `module`, is a known spectral norm's."""
    return isinstance(hook, LegacySpectralNorm) or is_hook_with_u_alone(hook, module)


def foreign_norms(name: str, module: Any, say: Callable[[str], None]) -> Iterator[tuple[str, Callable[[], Member]]]:
    """Yield the tensors of `module` that another code base's spectral norm normalises, and what puts ours in its place.

    `say` is told of what is recognised but left alone.
    """
    for key, hook in module._forward_pre_hooks.items():
        if isinstance(hook, LegacySpectralNorm):
            yield hook.name, partial(_legacy, _joined(name, hook.name), module, key, hook)
        elif is_hook_with_u_alone(hook, module):
            at = [(module, hook.name + "_orig"), (module, hook.name + "_u"), None]
            still = lambda key=key, hook=hook: module._forward_pre_hooks.get(key) is hook  # noqa: E731
            held = Holder(0, 1, 1e-12)
            yield hook.name, partial(_member, _joined(name, hook.name), hook, module, _FusedHook, held, at, still=still)
    if (method := method_of(module)) is not None:
        u, sigma, iterations = METHODS[method]
        if getattr(module, "num_svs", 1) != 1:
            say(f"{name}: it keeps {module.num_svs} singular values")
            return
        dim = int(bool(getattr(module, "transpose", False)))
        held = Holder(dim, getattr(module, iterations, 1), getattr(module, "eps", 1e-12))
        at = [(module, "weight"), (module, u), None]
        sigma_at, whose = (module, sigma), _joined(name, "weight")
        yield "weight", partial(_member, whose, module, module, _OVERRIDING[method], held, at, sigma_at)
    elif is_wrapper(module):
        held = Holder(0, getattr(module, "power_iterations", 1), 1e-12)
        at = [(module.module, module.name + end) for end in ("_bar", "_u", "_v")]
        yield module.name, partial(_member, _joined(name, module.name), module, module.module, _FusedWrapper, held, at)


def _member(
    name: str, changed: Any, module: nn.Module, overriding: type, holder: Holder, at: list[Any], sigma_at: Any = None,
    still: Callable[[], bool] = lambda: True,
) -> Member:  # fmt: skip
    """Return the member whose `changed` object now asks the group; `module` has the weight."""
    held = changed.__dict__.get("_spectral_norm_holder")
    if held is None:
        changed._spectral_norm_holder = held = holder
        change_class(changed, overriding)

    def undo() -> None:
        restore_class(changed)
        del changed._spectral_norm_holder
        if isinstance(module.__dict__.get("weight", module._buffers.get("weight")), Tensor):
            own_memory(module, "weight")

    weight_at, u_at, v_at = at
    return Member(name, held, weight_at, u_at, v_at, True, still, undo, sigma_at, own_evaluation=True)


def _legacy(name: str, module: nn.Module, key: int, hook: Any) -> Member:
    ours = hook if isinstance(hook, LegacyHook) else LegacyHook(hook)
    module._forward_pre_hooks[key] = ours

    def is_alive() -> bool:
        return module._forward_pre_hooks.get(key) is ours

    def undo() -> None:
        module._forward_pre_hooks[key] = ours.theirs
        own_memory(module, ours.name)

    weight_at, u_at, v_at = ((module, ours.name + end) for end in ("_orig", "_u", "_v"))
    return Member(name, ours, weight_at, u_at, v_at, True, is_alive, undo)


def saved_spectral_norm(state: Mapping[str, Tensor], name: str) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return W, u (R,) and v (K,) of the layer `name` of a state dict of another code base, or None if it has none.

    They give the W/sigma that the layer uses in evaluation. Where u alone is saved, that takes an iteration.
    """
    if f"{name}.weight_orig" in state:
        weight, u = state[f"{name}.weight_orig"], state[f"{name}.weight_u"]
        if f"{name}.weight_v" in state:
            return weight, u, state[f"{name}.weight_v"]
    else:
        vectors = [state[key] for u, _, _ in METHODS.values() if (key := f"{name}.{u}") in state]
        if not vectors:
            return None
        weight, u = state[f"{name}.weight"], vectors[0]
    matrix = weight.detach().flatten(1).double()
    v = F.normalize(matrix.t() @ u.detach().double().view(-1), dim=0)
    return weight, F.normalize(matrix @ v, dim=0).to(weight.dtype), v.to(weight.dtype)


def unrecognised(model: nn.Module, taken: set[int]) -> list[str]:
    """Return the names of modules that look spectral-normed, by the names of their tensors, and are not `taken`."""
    found = []
    for name, module in model.named_modules():
        own = [*module._parameters, *module._buffers]
        looks = any(re.fullmatch(r"u\d+|sn_u|_u|weight_u|weight_bar", tensor) for tensor in own)
        if looks and id(module) not in taken and "parametrizations" not in name.split("."):
            found.append(name or type(module).__name__)
    return found


def _joined(module_name: str, tensor_name: str) -> str:
    return (f"{module_name}.{tensor_name}".removesuffix(".weight") or "weight").lstrip(".")
