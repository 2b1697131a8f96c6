"""Which backend runs each attention and each spectral norm, and why."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from sagan_fast.kernels.self_attention.inputs import BlockInputs
from sagan_fast.layers.self_attention import SelfAttention2d
from sagan_fast.layers.spectral_norm import GroupedForward, group_of
from sagan_fast.ops.backends import choose
from sagan_fast.ops.self_attention import choose_block
from sagan_fast.words import counted


def explain(target: nn.Module | Tensor, *args: Any, **kwargs: Any) -> str:
    """Return, a line for each op, which backend runs it and why.

    `target` is a module, whose attention is explained for the input it last saw, or the arguments of
    `functional.self_attention_2d` or of `functional.attention`. Raises RuntimeError or ValueError where that call
    would.
    """
    if isinstance(target, nn.Module):
        lines = _attentions(target) + _spectral_norms(target)
        return "\n".join(lines) or f"{type(target).__name__} has no attention and no spectral norm of sagan_fast"
    backend = kwargs.get("backend", "auto")
    if target.ndim == 4 and (len(args) > 2 or "w_g" in kwargs):
        inputs = BlockInputs(target, *args, **{name: kwargs[name] for name in BlockInputs._fields if name in kwargs})
        return f"self_attention_2d: {choose_block(inputs, kwargs.get('pool', True), backend)}"
    k, v = (args[i] if len(args) > i else kwargs[name] for i, name in enumerate("kv"))
    *images, N, D_QK = target.shape  # and heads
    choice = choose("attention", backend, target, math.prod(images), N, k.shape[-2], D_QK, v.shape[-1])
    return f"attention: {choice}"


def _attentions(model: nn.Module) -> list[str]:
    lines = []
    for name, module in model.named_modules():
        if isinstance(module, SelfAttention2d):
            backend, choice = module.backend, module.last_choice
        elif "_attention_form" in module.__dict__:  # of `accelerate`
            backend, choice = "auto", module.__dict__.get("_attention_choice")
        else:
            continue
        lines.append(f"{name or type(module).__name__}: {choice or f'{backend} (has not run yet)'}")
    return lines


def _spectral_norms(model: nn.Module) -> list[str]:
    groups = {id(group): group for module in model.modules() if (group := group_of(module)) is not None}
    lines = [line for group in groups.values() for line in group.explain()]
    alone = sum(isinstance(module, GroupedForward) and group_of(module) is None for module in model.modules())
    if alone:
        weights = counted(alone, "weight")
        lines.append(f"spectral norm of {weights}: one at a time (fuse_spectral_norm(model) takes them together)")
    return lines
