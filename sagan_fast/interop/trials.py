"""Float64 trials of a module before it is changed: on a copy, with new weights, on a map that is not square."""

from __future__ import annotations

import copy
import dis
import inspect
import math
import warnings
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sagan_fast.interop.attention_forms import Form, at, fused_forward, possible_forms, projections
from sagan_fast.layers.effective_weight import weight_now
from sagan_fast.layers.foreign_spectral_norm import is_spectral_norm_hook
from sagan_fast.layers.spectral_norm import fuse_spectral_norm

HEIGHT, WIDTH = 6, 10
LIMIT = 1e-10
"""Largest relative difference of a match, outputs and gradients, in float64."""


class Mismatch(Exception):
    """Why a module stays as it is."""


def float64_copy(module: nn.Module) -> nn.Module:
    """Return a copy of `module` on the CPU in float64, without hooks but those of spectral norm.

    W/sigma that such a hook left there is copied without its history.
    """
    memo: dict[int, Any] = {}
    for part in module.modules():
        for hooks in (part._forward_hooks, part._backward_hooks, part._backward_pre_hooks):
            memo[id(hooks)] = OrderedDict()
        pre = part._forward_pre_hooks
        memo[id(pre)] = OrderedDict((k, copy.deepcopy(h)) for k, h in pre.items() if is_spectral_norm_hook(h, part))
        for value in (*part.__dict__.values(), *part._buffers.values()):
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(module, memo).to("cpu", torch.float64)


class State:
    """The parameters and buffers of a module, to be put back: those that a hook replaced, too."""

    def __init__(self, module: nn.Module) -> None:
        parts = list(module.modules())
        self.values = [(p, p.detach().clone()) for part in parts for p in part._parameters.values() if p is not None]
        self.buffers = [
            (part, key, b.detach().clone()) for part in parts for key, b in part._buffers.items() if b is not None
        ]

    def restore(self) -> None:
        for parameter, value in self.values:
            parameter.data = value.clone()
        for part, key, value in self.buffers:
            part._buffers[key] = value.clone()


def relative(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference of `found` from `expected`, in units of the largest of `expected`."""
    if found.shape != expected.shape:
        return math.inf
    scale = expected.detach().abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    return float((found.detach() - expected.detach()).abs().max() / scale)


def worst_of(*differences: float) -> float:
    """Return the largest of `differences`; it is not a number if one of them is not."""
    return float(torch.tensor(differences, dtype=torch.float64).max())


def attention_form(module: nn.Module, paths: list[tuple[str, ...]], gammas: list[str]) -> tuple[Form, float]:
    """Return the form that `module` has, and the largest relative difference of outputs and gradients.

    Raises Mismatch if it has none.
    """
    needed, reads_more = _further_arguments(module)
    draw = torch.Generator().manual_seed(0)
    double = float64_copy(module)
    for parameter in double.parameters():
        if parameter.requires_grad or parameter.numel() == 1:
            spread = 1.5 / math.sqrt(parameter[0].numel()) if parameter.ndim > 1 else 0.5
            parameter.data = torch.randn(parameter.shape, generator=draw, dtype=torch.float64) * spread
    for name in gammas:
        double._parameters[name].data.fill_(0.8)  # type: ignore[union-attr]
    channels = [getattr(at(double, path), "module", at(double, path)).in_channels for path in paths]
    C = max(set(channels), key=channels.count)
    x = torch.randn(2, C, HEIGHT, WIDTH, generator=draw, dtype=torch.float64, requires_grad=True)

    def own(x: Tensor) -> Any:
        return double(x, *[None] * needed)

    try:
        for _ in range(5):  # random u and v of spectral norm come to rest
            own(x)
        state = State(double)
        largest = 0.0
        form: Form | None = None
        for training in (True, False):
            double.train(training)
            expected = _run(state, own, x)
            if relative(_run(state, own, x)[0], expected[0]) > 0:
                raise Mismatch("its output is random")
            if form is None:
                form = _find(double, state, possible_forms(double, paths, gammas), x, expected, reads_more)
            largest = max(largest, _compare(double, state, form, own, x))
    except Mismatch:
        raise
    except Exception as error:  # anything that the module's own code may raise
        raise Mismatch(f"it does not run on a map of {HEIGHT} x {WIDTH} ({type(error).__name__}: {error})") from error
    assert form is not None
    return form, largest


def _run(state: State, function: Callable[[Tensor], Any], x: Tensor) -> tuple[Any, ...]:
    state.restore()
    out = function(x)
    out = out if isinstance(out, (tuple, list)) else (out,)
    if len(out) > 2 or not all(isinstance(part, Tensor) for part in out):
        raise Mismatch("it returns more than its output and a map")
    return tuple(out)


def _find(double: nn.Module, state: State, forms: Any, x: Tensor, expected: Any, reads_more: bool) -> Form:
    forms, nearest = list(forms), math.inf
    for form in forms:
        difference = relative(_run(state, partial(fused_forward, double, form), x)[0], expected[0])
        nearest = min(nearest, difference)
        if difference > LIMIT:
            continue
        form = form._replace(reads_more=reads_more)
        if len(expected) == 1:
            return form  # type: ignore[no-any-return]
        for returns in ("map", "transposed"):
            form = form._replace(returns=returns)
            found = _run(state, partial(fused_forward, double, form), x)[1]
            if found.shape == expected[1].shape and relative(found + 0, expected[1]) <= LIMIT:
                return form  # type: ignore[no-any-return]
        raise Mismatch("what it returns beside its output is not its map")
    raise Mismatch(_deviation(double, state, forms, x, expected[0], nearest))


def _deviation(double: Any, state: State, forms: list[Form], x: Tensor, expected: Tensor, nearest: float) -> str:
    """Return the known deviation from the block that gives `expected`, or how far the nearest form is from it."""
    for form in forms:
        state.restore()
        q, k, v = projections(double, form, x)
        scores, gamma = q @ k.mT, getattr(double, form.gamma)
        scale = q.shape[-1] ** -0.5
        for residual in (1, 0):
            for said, beta in (
                ("", scores.softmax(2)),
                ("it scales its scores by 1/sqrt(d)", (scores * scale).softmax(2)),
                ("its softmax runs over the queries", scores.softmax(1)),
            ):
                out = (beta @ v).mT.reshape(x.shape[0], -1, *x.shape[2:])
                if form.o is not None:
                    conv = at(double, form.o)
                    weight, bias = weight_now(conv), getattr(getattr(conv, "module", conv), "bias", None)
                    out = torch.einsum("oc,bchw->bohw", weight.flatten(1), out)
                    out = out if bias is None else out + bias[:, None, None]
                if relative(residual * x + gamma * out, expected) <= LIMIT:
                    both = [said, "" if residual else "it adds no residual x"]
                    return ", and ".join(part for part in both if part)
    far = "no roles of its convolutions fit" if math.isinf(nearest) else f"the nearest form is {nearest:.2g} off"
    return f"its output is not that of the block: {far}"


def _compare(double: nn.Module, state: State, form: Form, own: Callable[[Tensor], Any], x: Tensor) -> float:
    """Return the largest difference of outputs and gradients; Mismatch if it is over the limit."""
    inputs = [x, *(p for p in double.parameters() if p.requires_grad)]
    found = []
    for function in (own, lambda x: fused_forward(double, form, x)):
        out = _run(state, function, x)[0]
        grads = torch.autograd.grad(out.square().sum(), inputs, allow_unused=True)
        found.append([out, *(torch.zeros_like(t) if g is None else g for g, t in zip(grads, inputs, strict=True))])
    scale = max(float(g.abs().max()) for g in found[0][1:])
    worst = relative(found[1][0], found[0][0])
    for ours, theirs in zip(found[1][1:], found[0][1:], strict=True):
        worst = worst_of(worst, float((ours - theirs).abs().max()) / scale)
    if not worst <= LIMIT:
        raise Mismatch(f"its output or gradient differs by {worst:.2g} from that of the block")
    return worst


def _further_arguments(module: nn.Module) -> tuple[int, bool]:
    """Return how many arguments after x the forward must be given, and whether it reads any of those it may get."""
    forward = type(module).forward
    parameters = list(inspect.signature(forward).parameters.values())[2:]
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [p.name for p in parameters if p.default is inspect.Parameter.empty and p.kind in kinds]
    names = {p.name for p in parameters}
    if hasattr(forward, "__wrapped__") or not hasattr(forward, "__code__"):
        read = names
    else:
        read = set()
        for step in dis.get_instructions(forward):
            if step.opname.startswith(("LOAD_FAST", "LOAD_DEREF", "LOAD_CLOSURE")):
                read |= set(step.argval if isinstance(step.argval, tuple) else (step.argval,)) & names
    if read & set(needed):
        raise Mismatch(f"its forward reads {sorted(read & set(needed))[0]!r} beside x")
    return len(needed), bool(read) or not names


def spectral_norm_difference(module: nn.Module, tensor: str = "weight") -> float:
    """Return the largest relative difference of W/sigma, its gradient, u and v in training, of a fused copy's.

    Raises Mismatch if it is over the limit.
    """
    theirs = float64_copy(module).train()
    ours = float64_copy(module).train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fuse_spectral_norm(ours, update="forward")
    worst = 0.0
    for _ in range(2):
        results = []
        for each in (ours, theirs):
            weight = weight_now(each) if tensor == "weight" else getattr(each, tensor)
            own = [p for p in each.parameters() if p.requires_grad and p.shape == weight.shape]
            rows = torch.linspace(-1, 1, weight.numel(), dtype=torch.float64).view(weight.shape)
            grads = torch.autograd.grad((weight * rows).sum(), own)
            vectors = [t for key, t in each.state_dict().items() if key.rpartition(".")[2] != "weight"]
            results.append([weight, *grads, *vectors])
        if len(results[0]) != len(results[1]):
            raise Mismatch("its tensors change when it is fused")
        worst = worst_of(worst, *(relative(a, b) for a, b in zip(*results, strict=True)))
    if not worst <= LIMIT:
        raise Mismatch(f"its spectral norm differs by {worst:.2g} from the power iteration of one vector")
    return worst
