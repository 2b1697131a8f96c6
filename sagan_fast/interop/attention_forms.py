"""The forms of the attention block in other code bases, and a forward that computes a module of such a form fused."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sagan_fast.interop.attention_map import LazyMap
from sagan_fast.kernels.self_attention.inputs import BlockInputs
from sagan_fast.layers.effective_weight import bias_of, has_hooks, is_direct, weight_now
from sagan_fast.layers.foreign_spectral_norm import is_wrapper
from sagan_fast.ops.self_attention import block_on, check_block, choose_block

Path = tuple[str, ...]


class Form(NamedTuple):
    """Which children of a module are which part of the block, by the names that lead to their convolutions.

    `returns` says what comes beside the output: nothing, the "map" (B, N, M), or "transposed" (B, M, N). With
    `reads_more` the forward uses more than x where the caller gives it: then the module's own runs.
    """

    theta: Path
    phi: Path
    g: Path
    o: Path | None
    gamma: str
    pool: bool
    returns: str | None = None
    reads_more: bool = True


def convolution_path(child: Any) -> Path | None:
    """Return the names from `child` to the one convolution, or wrapper of one, that it is or contains, or None."""
    if isinstance(child, (nn.Conv1d, nn.Conv2d)) or (
        is_wrapper(child) and isinstance(child.module, (nn.Conv1d, nn.Conv2d))
    ):
        return ()
    inner = [
        (name, convolution_path(each))
        for name, each in child.named_children()
        if next(each.parameters(), None) is not None
    ]
    if len(inner) != 1 or inner[0][1] is None or any(p is not None for p in child._parameters.values()):
        return None
    return (inner[0][0], *inner[0][1])


def at(module: Any, path: Path) -> Any:
    """Return the convolution, or the wrapper that normalises it, at `path` from `module`."""
    for name in path:
        module = module._modules[name]
    return module


def are_direct(module: nn.Module, form: Form) -> bool:
    """Return whether all convolutions of `form` may be computed without a call of them, and of what contains them."""
    for path in form[:4]:
        if path is None:
            continue
        if not is_direct(at(module, path)) or any(has_hooks(at(module, path[:i])) for i in range(1, len(path))):
            return False
    return True


def possible_forms(module: nn.Module, paths: list[Path], gammas: list[str]) -> Iterator[Form]:
    """Yield the forms whose shapes fit: every convolution in every role, pooled and not."""
    sizes = {}
    for path in paths:
        conv = at(module, path)
        conv = getattr(conv, "module", conv)
        sizes[path] = conv.in_channels, conv.out_channels
    for order in itertools.permutations(paths):
        theta, phi, g = order[:3]
        o = order[3] if len(order) == 4 else None
        C, D_QK = sizes[theta]
        D_V = sizes[g][1]
        if sizes[phi] != (C, D_QK) or sizes[g][0] != C or (o is None and D_V != C) or (o and sizes[o] != (D_V, C)):
            continue
        for gamma, pool in itertools.product(gammas, (True, False)):
            yield Form(theta, phi, g, o, gamma, pool)


def projections(module: nn.Module, form: Form, x: Tensor) -> list[Tensor]:
    """Return q (B, N, D_QK), k (B, M, D_QK) and v (B, M, D_V) of a module of `form`, by calls of its convolutions."""
    found = []
    for path in form[:3]:
        conv = at(module, path)
        weight, bias = _as_2d(weight_now(conv)), bias_of(conv)
        y = F.conv2d(x, weight, bias)
        if form.pool and path is not form.theta:
            y = F.max_pool2d(y, 2)
        found.append(y.flatten(2).transpose(1, 2))
    return found


def fused_forward(module: nn.Module, form: Form, x: Tensor) -> Any:
    """Return what `module`, of `form`, returns for `x` (B, C, H, W), without its map in memory."""
    convs = [None if path is None else at(module, path) for path in form[:4]]
    weights = [None if conv is None else _as_2d(weight_now(conv)) for conv in convs]
    b_theta, b_phi, b_g, b_o = (None if conv is None else bias_of(conv) for conv in convs)
    w_theta, w_phi, w_g, w_o = weights
    assert w_theta is not None and w_phi is not None and w_g is not None
    gamma = getattr(module, form.gamma).reshape(())
    inputs = BlockInputs(x, w_theta, w_phi, w_g, w_o, gamma, b_theta, b_phi, b_g, b_o)
    check_block(inputs, form.pool)
    choice = choose_block(inputs, form.pool, "auto")
    if not torch.compiler.is_compiling():
        module.__dict__["_attention_choice"] = choice
    out = block_on(choice.backend, inputs, form.pool)
    if form.returns is None:
        return out
    return out, _map(form, x, (w_theta, w_phi), (b_theta, b_phi))


def _as_2d(weight: Tensor) -> Tensor:
    return weight if weight.ndim == 4 else weight.unsqueeze(-1)


def _map(form: Form, x: Tensor, weights: tuple[Tensor, ...], biases: tuple[Tensor | None, ...]) -> Tensor:
    """Return the map of weights and biases of theta and phi: later, and as of now, if it is used at all."""
    parts = [*weights, *(b for b in biases if b is not None)]
    kept = [part.detach().clone() for part in parts]  # small: an optimizer may step before somebody looks
    versions, grad, autocast = [part._version for part in (x, *parts)], torch.is_grad_enabled(), _autocast_of(x)

    def compute() -> Tensor:
        if x._version != versions[0]:
            raise RuntimeError("the attention map cannot be computed any more: its module's input was changed in place")
        now = parts if [part._version for part in parts] == versions[1:] else kept
        w_theta, w_phi, *rest = now
        b_theta, b_phi = (None if b is None else rest.pop(0) for b in biases)
        with torch.set_grad_enabled(grad), torch.autocast(**autocast):
            q, k = F.conv2d(x, w_theta, b_theta), F.conv2d(x, w_phi, b_phi)
            if form.pool:
                k = F.max_pool2d(k, 2)
            beta = (q.flatten(2).transpose(1, 2) @ k.flatten(2)).softmax(-1).to(x.dtype)
        return beta if form.returns == "map" else beta.transpose(1, 2)

    if torch.compiler.is_compiling():
        return compute()
    B, N = x.shape[0], x.shape[2] * x.shape[3]
    M = (x.shape[2] // 2) * (x.shape[3] // 2) if form.pool else N
    return LazyMap(compute, (B, N, M) if form.returns == "map" else (B, M, N), x)


def _autocast_of(x: Tensor) -> dict[str, Any]:
    kind = x.device.type
    on = torch.is_autocast_enabled(kind)
    return {"device_type": kind, "enabled": on, "dtype": torch.get_autocast_dtype(kind) if on else None}


class FusedAttention:
    """Put in front of a module's class: computes it by its `_attention_form`, or as before where that does not hold."""

    _attention_form: Form

    def forward(self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        form = self._attention_form
        more = args or kwargs
        if (more and form.reads_more) or x.ndim != 4 or not are_direct(self, form):
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        return fused_forward(self, form, x)
