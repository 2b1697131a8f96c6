"""Float64 trials of a conditional batch norm before it is changed: outputs, gradients and running averages."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sagan_fast.interop.batch_norm_forms import (
    NormForm,
    Parts,
    backend_for,
    channels_of,
    fused_forward,
    layer_of,
    possible_forms,
)  # fmt: skip
from sagan_fast.interop.trials import HEIGHT, LIMIT, WIDTH, Mismatch, State, float64_copy, relative, worst_of
from sagan_fast.layers.effective_weight import has_hooks

IMAGES = 3


def norm_form(module: nn.Module, parts: Parts) -> tuple[NormForm, float]:
    """Return the form that `module` has, and the largest relative difference of outputs, gradients and buffers.

    Raises Mismatch if it has none.
    """
    _check(module, parts)
    double = float64_copy(module)
    for i, name in enumerate(key for key, value in double.__dict__.items() if type(value) is float):
        double.__dict__[name] *= 1.1 + 0.1 * i  # so that one can be told from a number, and from another
    try:
        trial = _Trial(double, parts)
        forms = [form._replace(**trial.constants(form)) for form in possible_forms(parts)]
        form = trial.matching(forms)
        return form, worst_of(*(trial.difference(form, training) for training in (True, False)))
    except Mismatch:
        raise
    except Exception as error:  # anything that the module's own code may raise
        raise Mismatch(f"it does not run on a map of {HEIGHT} x {WIDTH} ({type(error).__name__}: {error})") from error


def _check(module: nn.Module, parts: Parts) -> None:
    """Raise Mismatch for what is left alone without a trial."""
    if "forward" in module.__dict__:
        raise Mismatch("its forward was replaced on the instance")
    if parts.norm is None:
        return
    norm: Any = module._modules[parts.norm]
    if type(norm) is not nn.BatchNorm2d:
        raise Mismatch(f"{parts.norm} normalises in a way of its own, that of the class {type(norm).__name__}")
    if norm.affine:
        raise Mismatch(f"{parts.norm} has a gain and a bias of its own")
    if has_hooks(norm):
        raise Mismatch(f"{parts.norm} has hooks, which would not run")


class _Trial:
    """A copy with random parameters and running averages, and the inputs on which it is compared."""

    def __init__(self, double: nn.Module, parts: Parts) -> None:
        draw = torch.Generator().manual_seed(0)

        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=draw, dtype=torch.float64)

        self.double, self.parts = double, parts
        for parameter in double.parameters():
            if parameter.requires_grad:
                spread = 1.5 / math.sqrt(parameter[0].numel()) if parameter.ndim > 1 else 0.5
                parameter.data = randn(*parameter.shape) * spread
        keeper: Any = double if parts.norm is None else double._modules[parts.norm]
        C = channels_of(keeper) or 0
        layer: Any = layer_of(double._modules[parts.layers[0]])
        self.x = (1 + 2 * randn(IMAGES, C, HEIGHT, WIDTH)).requires_grad_()
        self.inputs = [self.x, *(p for p in double.parameters() if p.requires_grad)]
        if isinstance(layer, nn.Embedding):
            self.y = torch.randint(layer.num_embeddings, (IMAGES,), generator=draw)
        else:
            self.y = randn(IMAGES, layer.in_features).requires_grad_()
            self.inputs.append(self.y)
        self.weights = randn(*self.x.shape)
        with torch.no_grad():
            for _ in range(5):  # random u and v of spectral norm come to rest
                double(self.x, self.y)
            for name in parts.buffers or ("running_mean", "running_var"):
                if keeper._buffers[name] is not None:
                    keeper._buffers[name].copy_(0.5 + randn(C).abs())
        self.state = State(double)

    def own(self, x: Tensor) -> Tensor:
        """Return what the copy itself makes of `x`."""
        out = self.double(x, self.y)
        if not isinstance(out, Tensor):
            raise Mismatch("it returns more than a map")
        return out

    def ours(self, form: NormForm) -> Callable[[Tensor], Tensor]:
        """Return the function that computes the copy as of `form`."""

        def function(x: Tensor) -> Tensor:
            backend = backend_for(self.double, form, x, self.y)
            assert backend is not None
            return fused_forward(self.double, form, x, self.y, backend)

        return function

    def constants(self, form: NormForm) -> dict[str, Any]:
        """Return momentum and eps of a module that keeps its running averages itself, or the attributes they are in.

        With a mean and a variance of v each, the slope of the output is the gain over sqrt(v + eps).
        """
        if form.norm is not None:
            return {}
        slopes = []
        self.double.eval()
        for v in (0.0, 1.0):
            self.state.restore()
            for name in (form.mean, form.var):
                self.double._buffers[name].fill_(v)  # type: ignore[union-attr]
            far = (1e4 * self.x.detach()).requires_grad_()  # there a bias does not count, if a ReLU follows
            slopes.append(float(torch.autograd.grad(self.own(far).sum(), far)[0].abs().max()))
        self.double.train()
        self.state.restore()
        before: Any = self.double._buffers[form.mean]
        before = before.clone()
        with torch.no_grad():
            self.own(self.x)
            away = self.x.mean((0, 2, 3)) - before
            moved: Any = self.double._buffers[form.mean]
            momentum = float((moved - before) @ away / (away @ away))
        square = (slopes[0] / slopes[1]) ** 2 if slopes[1] else 1.0
        eps = 1 / (square - 1) if square != 1 else math.inf
        return {"momentum": self._source_of(momentum), "eps": self._source_of(eps)}

    def _source_of(self, value: float) -> float | str:
        for name, held in self.double.__dict__.items():
            if type(held) is float and math.isclose(held, value, rel_tol=1e-9):
                return name
        return float(f"{value:.10g}")

    def matching(self, forms: list[NormForm]) -> NormForm:
        """Return the form whose output in evaluation is that of the copy; Mismatch if there is none."""
        self.double.eval()
        nearest = math.inf
        with torch.no_grad():
            outs = []
            for _ in range(2):
                self.state.restore()
                outs.append(self.own(self.x))
            if not torch.equal(*outs):
                raise Mismatch("its output is random")
            for form in forms:
                self.state.restore()
                difference = relative(self.ours(form)(self.x), outs[0])
                if difference <= LIMIT:
                    return form
                nearest = min(nearest, difference)
        raise Mismatch(f"its output is not that of conditional batch norm: the nearest form is {nearest:.2g} off")

    def difference(self, form: NormForm, training: bool) -> float:
        """Return the largest difference of outputs, gradients and buffers; Mismatch if it is over the limit."""
        self.double.train(training)
        (out, grads, buffers), (right, right_grads, right_buffers) = map(self._results, (self.ours(form), self.own))
        scale = max(float(grad.abs().max()) for grad in right_grads)
        apart = [float((a - b).abs().max()) / scale for a, b in zip(grads, right_grads, strict=True)]
        moved = [relative(a, b) for a, b in zip(buffers, right_buffers, strict=True)]
        worst = worst_of(relative(out, right), *apart, *moved)
        if not worst <= LIMIT:
            mode = "training" if training else "evaluation"
            raise Mismatch(f"its output, gradient or running averages differ by {worst:.2g} in {mode}")
        return worst

    def _results(self, function: Callable[[Tensor], Tensor]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        self.state.restore()
        out = function(self.x)
        grads = torch.autograd.grad((out.square() * self.weights).sum(), self.inputs, allow_unused=True)
        zeros = [torch.zeros_like(t) if g is None else g for g, t in zip(grads, self.inputs, strict=True)]
        return out, zeros, [b.detach().double().clone() for b in self.double.buffers()]
