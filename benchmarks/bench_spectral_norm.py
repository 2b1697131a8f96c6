"""One update of all 44 spectral-normed weights of SAGAN, ours against torch's and BigGAN's.

python -m benchmarks.bench_spectral_norm [options of benchmarks.run]
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import Case, Provider, Run
from benchmarks.peers_spectral_norm import draw, modules, parameters
from benchmarks.shapes import SAGAN_MATRICES, Matrix
from sagan_fast.functional import spectral_norm_group
from sagan_fast.layers.spectral_norm import fuse_spectral_norm

SMALL = tuple(Matrix(m.name, min(m.R, 64), min(m.K, 128)) for m in SAGAN_MATRICES)
"""The 44 matrices cut down, for trying the benchmark out."""


def cases(device: str, matrices: Sequence[Matrix] = SAGAN_MATRICES, who: str | None = None) -> Iterator[Case]:
    """Yield the forward (iteration, sigma, W/sigma) and forward+backward cases of all matrices together.

    `who`: the device whose providers are asked, where that is not `device`: a GPU's, in a dry run.
    """
    for mode in ("forward", "forward+backward"):
        yield case(mode, device, matrices, who)


def case(mode: str, device: str, matrices: Sequence[Matrix], who: str | None = None) -> Case:
    """Return the case: peers as torch modules called one by one, eager and compiled; ours as one group."""
    backward = mode != "forward"
    elements = sum(m.R * m.K for m in matrices)

    @functools.cache  # drawn when the first provider is prepared: cases can be listed where there is no device
    def grads() -> list[Tensor]:
        rngs = [torch.Generator(device).manual_seed(i) for i in range(len(matrices))]
        return [torch.randn(m.R, m.K, generator=g, device=device) for m, g in zip(matrices, rngs, strict=True)]

    def finish(outs: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
        if not backward:
            return [out.detach() for out in outs]
        return [*(o.detach() for o in outs), *torch.autograd.grad(outs, weights, grads())]

    def peer(kind: str, compiled: bool) -> Callable[[], Run]:
        def prepare() -> Run:
            made = modules(kind, matrices, device)

            def together() -> list[Tensor]:
                return [module() for module in made]

            function = torch.compile(together, dynamic=False) if compiled else together

            def run(i: int) -> list[Tensor]:
                with torch.set_grad_enabled(backward):
                    return finish(function(), parameters(made))

            return run

        return prepare

    def ours(backend: str) -> Callable[[], Run]:
        def prepare() -> Run:
            weights, us, vs = draw(matrices, device)
            weights = [nn.Parameter(w) for w in weights]

            def run(i: int) -> list[Tensor]:
                with torch.set_grad_enabled(backward):
                    return finish(spectral_norm_group(weights, us, vs, backend=backend), weights)

            return run

        return prepare

    def fused(backend: str) -> Callable[[], Run]:
        def prepare() -> Run:
            made = modules("ours", matrices, device)
            group = fuse_spectral_norm(made, update="step", backend=backend)

            def run(i: int) -> list[Tensor]:
                with torch.set_grad_enabled(backward):
                    group.step()
                    return finish([module() for module in made], parameters(made))

            return run

        return prepare

    def truth(u_first: bool) -> Callable[[], list[Tensor]]:
        def make() -> list[Tensor]:
            weights, us, vs = ([t.double() for t in tensors] for tensors in draw(matrices, device))
            weights = [w.requires_grad_() for w in weights]
            outs = []
            for w, u, v in zip(weights, us, vs, strict=True):
                with torch.no_grad():
                    if not u_first:
                        v = F.normalize(w.T @ u, dim=0)
                    u = F.normalize(w @ v, dim=0)
                    if u_first:
                        v = F.normalize(w.T @ u, dim=0)
                outs.append(w / (u @ w @ v))
            if not backward:
                return outs
            return [*outs, *torch.autograd.grad(outs, weights, [g.double() for g in grads()])]

        return make

    u_first, v_first = truth(True), truth(False)
    kinds = [Provider("parametrization", peer("parametrization", False))]
    kinds += [Provider(kind, peer(kind, False), truth=v_first) for kind in ("legacy", "biggan")]
    if (who or device) == "cuda":
        kinds.append(Provider("parametrization-compiled", peer("parametrization", True)))
        kinds.append(Provider("biggan-compiled", peer("biggan", True), truth=v_first))
    backend = "triton" if (who or device) == "cuda" else "auto"
    kinds.append(Provider("function", ours(backend)))  # new memory for W/sigma at every call
    kinds.append(Provider("group", fused(backend)))  # what fuse_spectral_norm gives a model: memory that stays
    reads = 3 if not backward else 6
    return Case(
        "spectral_norm", f"{len(matrices)}-matrices", "fp32", mode, kinds, u_first,
        repeatable=False,  # u and v move on
        config={"elements": elements},
        needs=(0.0, 0.0, reads * 4.0 * elements),
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Measure on the device at hand and append the records; see benchmarks/run.py for the options."""
    from benchmarks.run import main as run

    return run(["--only", "spectral_norm", *(argv or sys.argv[1:])])


if __name__ == "__main__":
    sys.exit(main())
