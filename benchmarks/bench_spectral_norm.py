"""One update of all 44 spectral-normed weights of SAGAN, ours against torch's and BigGAN's."""

import functools
import warnings
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import Case, Provider, Run, Target
from benchmarks.shapes import SAGAN_MATRICES
from sagan_fast.functional import spectral_norm_group
from sagan_fast.kernels.spectral_norm.reference import normalise, power_iteration
from sagan_fast.layers.spectral_norm import fuse_spectral_norm, spectral_norm

SMALL = [(min(R, 64), min(K, 128)) for R, K in SAGAN_MATRICES]
"""The 44 matrices cut down, for trying the benchmark out."""


def cases(target: Target, matrices: Sequence[tuple[int, int]] | None = None) -> Iterator[Case]:
    """Yield the forward (iteration, sigma, W/sigma) and forward+backward cases of all matrices together."""
    matrices = matrices or (SMALL[::4] if target.dry_run else SAGAN_MATRICES)
    for mode in ("forward", "forward+backward"):
        yield case(mode, matrices, target)


def case(mode: str, matrices: Sequence[tuple[int, int]], target: Target) -> Case:
    """Return the case: peers as torch modules called one by one, eager and compiled; ours as one group."""
    backward, device = mode != "forward", target.device
    elements = sum(R * K for R, K in matrices)

    @functools.cache  # drawn when the first provider is prepared: cases can be listed where there is no device
    def grads() -> list[Tensor]:
        rngs = [torch.Generator(device).manual_seed(i) for i in range(len(matrices))]
        return [torch.randn(size, generator=g, device=device) for size, g in zip(matrices, rngs, strict=True)]

    def runner(function: Callable[[], Sequence[Tensor]], weights: Sequence[Tensor]) -> Run:
        def run(i: int) -> list[Tensor]:
            with torch.set_grad_enabled(backward):
                outs = function()
                return [*(o.detach() for o in outs), *(torch.autograd.grad(outs, weights, grads()) if backward else ())]

        return run

    def prepare(kind: str, compiled: bool = False) -> Run:
        made = modules(kind, matrices, device)
        fused = fuse_spectral_norm(made, update="step", backend=target.backend) if kind == "ours" else None

        def together() -> list[Tensor]:
            if fused is not None:
                fused.step()
            return [module() for module in made]

        return runner(torch.compile(together, dynamic=False) if compiled else together, list(made.parameters()))

    def function() -> Run:
        drawn, us, vs = draw(matrices, device)
        weights = [nn.Parameter(w) for w in drawn]
        return runner(lambda: spectral_norm_group(weights, us, vs, backend=target.backend), weights)

    def truth(v_first: bool = False) -> list[Tensor]:
        weights, us, vs = ([t.double() for t in tensors] for tensors in draw(matrices, device))
        outs = []
        for w, u, v in zip(weights, us, vs, strict=True):
            if v_first:
                v, u = power_iteration(w.T, v, u)
            else:
                u, v = power_iteration(w, u, v)
            outs.append(normalise(w.requires_grad_(), u, v)[0])
        d_weights = torch.autograd.grad(outs, weights, [g.double() for g in grads()]) if backward else ()
        return [*outs, *d_weights]

    v_first = functools.partial(truth, v_first=True)
    truths = {"parametrization": None, "legacy": v_first, "biggan": v_first}
    providers = [Provider(kind, functools.partial(prepare, kind), truth=own) for kind, own in truths.items()]
    for kind in ("parametrization", "biggan") if target.gpu else ():
        compiled = functools.partial(prepare, kind, compiled=True)
        providers.append(
            Provider(f"{kind}-compiled", compiled, truth=truths[kind], compile_s=60.0 if backward else 30.0)
        )
    providers.append(Provider("function", function))  # new memory for W/sigma at every call
    # what fuse_spectral_norm gives a model: memory that stays
    providers.append(Provider("group", functools.partial(prepare, "ours"), compile_s=12.0 if target.gpu else 0.0))
    return Case(
        "spectral_norm", f"{len(matrices)}-matrices", "fp32", mode, providers, truth,
        repeatable=False,  # u and v move on
        config={"elements": elements},
        needs=(0.0, 0.0, (6 if backward else 3) * 4.0 * elements),
    )  # fmt: skip


def draw(matrices: Sequence[tuple[int, int]], device: str) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Return weights (R, K) and unit vectors u (R,), v (K,) for each of `matrices`, random, float32."""
    rng = torch.Generator(device).manual_seed(0)

    def unit(size: int) -> Tensor:
        return F.normalize(torch.randn(size, generator=rng, device=device), dim=0)

    weights = [torch.randn(R, K, generator=rng, device=device) * K**-0.5 for R, K in matrices]
    return weights, [unit(R) for R, _ in matrices], [unit(K) for _, K in matrices]


class _Holder(nn.Module):
    """A module with nothing but a weight, so that torch's own functions have something to hook into."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.clone())

    def forward(self) -> Tensor:
        return self.weight


class Biggan(_Holder):
    """One power iteration on the rows' side first, then W/sigma, in the order of BigGAN-PyTorch's layers."""

    def __init__(self, weight: Tensor, u: Tensor) -> None:
        super().__init__(weight)
        self.register_buffer("u0", u[None].clone())

    def forward(self) -> Tensor:
        with torch.no_grad():
            v = F.normalize(torch.matmul(self.u0, self.weight), eps=1e-12)
            self.u0[:] = F.normalize(torch.matmul(v, self.weight.t()), eps=1e-12)
        sigma = torch.squeeze(torch.matmul(torch.matmul(v, self.weight.t()), self.u0.t()))
        return self.weight / sigma


def modules(kind: str, matrices: Sequence[tuple[int, int]], device: str) -> nn.ModuleList:
    """Return a module for each matrix with spectral norm of `kind`: parametrization, ours, legacy or biggan."""
    made = nn.ModuleList()
    for weight, u, v in zip(*draw(matrices, device), strict=True):
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
