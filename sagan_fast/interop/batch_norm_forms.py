"""The forms of conditional batch norm in other code bases, and a forward that computes such a module fused."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sagan_fast.layers.batch_norm import fused, fused_backend
from sagan_fast.layers.foreign_spectral_norm import is_wrapper
from sagan_fast.ops.backends import choose_batch_norm
from sagan_fast.ops.batch_norm import Options, fused_batch_norm
from sagan_fast.ops.library import is_plain


class Parts(NamedTuple):
    """What a module is made of, by name: the layers that give gains and biases, and what keeps the statistics.

    `norm` is the child that normalises, or None where the module's own `buffers` keep mean and variance. There are two
    `layers` of C outputs or one of 2C. `condition` is the name of the argument after x.
    """

    layers: tuple[str, ...]
    norm: str | None
    buffers: tuple[str, ...]
    condition: str


class NormForm(NamedTuple):
    """Which part of a module is which part of conditional batch norm.

    One layer gives gain and bias side by side if `gain` and `bias` are the same; `bias_first` says in which order.
    `momentum` and `eps` are numbers, or names of attributes that hold them; only without `norm` are they used.
    """

    gain: str
    bias: str
    bias_first: bool
    norm: str | None
    mean: str
    var: str
    condition: str
    one_plus: bool
    relu: bool
    momentum: float | str = 0.1
    eps: float | str = 1e-5


def layer_of(child: Any) -> nn.Linear | nn.Embedding | None:
    """Return the linear layer or embedding that `child` is, or that it wraps to normalise the weight, or None."""
    inner = child.module if is_wrapper(child) else child
    return inner if isinstance(inner, (nn.Linear, nn.Embedding)) else None


def outputs_of(child: Any) -> int:
    """Return how many values a linear layer, an embedding or a wrapper of one gives for an image."""
    layer = layer_of(child)
    assert layer is not None
    return layer.out_features if isinstance(layer, nn.Linear) else layer.embedding_dim


def parts_of(module: nn.Module) -> Parts | None:
    """Return what `module` is made of if that may be a conditional batch norm, or None.

    Its forward takes a second argument. Its children with tensors are linear layers or embeddings, for gains and biases
    of C channels, and at most one other, which normalises C channels. Without that one it has two buffers (C,).
    """
    children = dict(module.named_children())
    layers = [name for name, child in children.items() if layer_of(child) is not None]
    norms = [name for name, child in children.items() if name not in layers and channels_of(child) is not None]
    if len(layers) not in (1, 2) or len(norms) > 1 or any(p is not None for p in module._parameters.values()):
        return None
    if any(child.state_dict() for name, child in children.items() if name not in layers + norms):
        return None
    C = channels_of(children[norms[0]] if norms else module)
    if C is None or any(outputs_of(children[name]) * len(layers) != 2 * C for name in layers):
        return None
    condition = _second_argument(module)
    if condition is None:
        return None
    return Parts(tuple(layers), norms[0] if norms else None, () if norms else _statistics(module), condition)


def channels_of(module: Any) -> int | None:
    """Return how many channels `module` normalises, a batch norm or a module with two running averages, or None."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return int(module.num_features)
    found = _statistics(module)
    sizes = {module._buffers[name].numel() for name in found}
    return sizes.pop() if len(found) == 2 and len(sizes) == 1 else None


def _statistics(module: Any) -> tuple[str, ...]:
    own = module._buffers.items()
    return tuple(key for key, b in own if b is not None and b.ndim == 1 and b.is_floating_point() and b.numel() > 1)


def _second_argument(module: nn.Module) -> str | None:
    try:
        arguments = list(inspect.signature(type(module).forward).parameters.values())[1:3]
    except (AttributeError, TypeError, ValueError):  # of a scripted module
        return None
    named = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return arguments[1].name if len(arguments) == 2 and all(each.kind in named for each in arguments) else None


def possible_forms(parts: Parts) -> Iterator[NormForm]:
    """Yield every form that the parts can have: each layer or half in each role, with 1 + gain and without."""
    first, last = parts.layers[0], parts.layers[-1]
    roles = [(first, last, False), (last, first, len(parts.layers) == 1)]
    orders = list(itertools.permutations(parts.buffers)) if parts.buffers else [("", "")]
    for (gain, bias, bias_first), (mean, var), one_plus, relu in itertools.product(
        roles, orders, (True, False), (False, True)
    ):
        yield NormForm(gain, bias, bias_first, parts.norm, mean, var, parts.condition, one_plus, relu)


def backend_for(module: Any, form: NormForm, x: Any, y: Any) -> str | None:
    """Return the backend for a map `x` and conditions `y`, or None where the module's own forward must run."""
    if not (isinstance(x, Tensor) and isinstance(y, Tensor)) or x.ndim != 4 or len(x) != len(y):
        return None
    if y.ndim != (1 if isinstance(layer_of(module._modules[form.gain]), nn.Embedding) else 2):
        return None
    if form.norm is not None:
        return fused_backend(module._modules[form.norm], x)
    if is_plain() or x.shape[1] != len(module._buffers[form.mean]):
        return None
    if module.training and x.numel() == x.shape[1]:
        return None  # their error is the one to see
    chosen = choose_batch_norm("accelerate", "auto", x).backend
    return None if chosen == "eager" else chosen


def fused_forward(module: Any, form: NormForm, x: Tensor, y: Tensor, backend: str) -> Tensor:
    """Return what `module`, of `form`, returns for `x` (B, C, H, W) and `y`, by one op behind its layers."""
    gain = module._modules[form.gain](y)
    if form.gain == form.bias:
        gain, bias = gain.chunk(2, 1)
        gain, bias = (bias, gain) if form.bias_first else (gain, bias)
    else:
        bias = module._modules[form.bias](y)
    if form.norm is None:
        momentum, eps = (getattr(module, v) if isinstance(v, str) else v for v in (form.momentum, form.eps))
        options = Options(module.training, momentum, eps, form.relu, form.one_plus, backend=backend)
        running = module._buffers[form.mean], module._buffers[form.var]
        out = fused_batch_norm(x, gain, bias, None, *running, options)
    else:
        how: dict[str, Any] = dict(relu=form.relu, one_plus=form.one_plus, backend=backend)
        found = fused(module._modules[form.norm], x, gain, bias, **how)
        assert found is not None  # as `backend_for` has asked
        out = found
    return out.to(torch.promote_types(x.dtype, gain.dtype))  # theirs is float32 for a bfloat16 map and float32 gains


class FusedNorm:
    """Put in front of a module's class: computes it by its `_norm_form`, or as before where that does not hold."""

    _norm_form: NormForm

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        form, given = self._norm_form, (*args, *kwargs.values())
        if len(given) == 2 and args and all(name == form.condition for name in kwargs):
            backend = backend_for(self, form, *given)
            if backend is not None:
                return fused_forward(self, form, *given, backend)
        return super().forward(*args, **kwargs)  # type: ignore[misc]
