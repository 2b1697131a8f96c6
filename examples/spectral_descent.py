"""An optimizer whose every update has a given spectral norm: run it with `python examples/spectral_descent.py`.

The update of a weight (R, K) is its momentum, scaled to the spectral norm lr * sqrt(R / K). Then features change by as
much at every width (Yang, Simon and Bernstein 2023, "A spectral condition for feature learning",
https://arxiv.org/abs/2310.17813, condition 1). One power iteration a step, with u and v kept in the optimizer's state,
follows the norm of the momentum, which changes slowly. All weights of a dtype take a few launches together on a GPU,
all experts of a layer among them.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sagan_fast.functional import scale_spectral_norms_, spectral_norms


class SpectralDescent(torch.optim.Optimizer):
    """SGD with momentum whose updates of matrices have the spectral norm lr * sqrt(R / K).

    Give stacks of matrices (E, R, K), such as the experts of a layer, in a group of their own with `"stacks": True`.
    Weights of more than two axes (convolutions) are matrices (R, K) with K = all but the first axis. Vectors and
    scalars (biases, gains) get updates whose root mean square is lr.
    """

    def __init__(self, params: Iterable[Any], lr: float = 0.02, momentum: float = 0.95) -> None:
        super().__init__(params, dict(lr=lr, momentum=momentum, stacks=False))

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> None:
        """Update all parameters that have a gradient. `closure` is not used."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            vectors = [p for p in params if p.ndim < 2]
            matrices = [p for p in params if p.ndim >= 2]
            updates = self._momenta(matrices, group)
            if matrices:
                us, vs = zip(*(self._vectors(p, group["stacks"]) for p in matrices), strict=True)
                # A matrix whose update is zero so far keeps u and v, and its update stays zero.
                sigmas = spectral_norms(updates, us, vs)
                scale_spectral_norms_(updates, sigmas, [_shape_factor(p, group["stacks"]) for p in matrices])
            for update in self._momenta(vectors, group):
                updates.append(update / update.square().mean().sqrt().clamp_min(1e-12))
            if params:
                torch._foreach_add_([*matrices, *vectors], updates, alpha=-group["lr"])

    def _momenta(self, params: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        """Return copies of the momenta of `params`, moved by their gradients."""
        found = []
        for p in params:
            state = self.state[p]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(p)
            found.append(state["momentum"].lerp_(p.grad, 1 - group["momentum"]).clone())
        return found

    def _vectors(self, p: Tensor, is_stack: bool) -> tuple[Tensor, Tensor]:
        """Return u and v of `p`, float32: (R,) and (K,), or (E, R) and (E, K) for a stack."""
        state = self.state[p]
        if "u" not in state:
            leading, R, K = _sizes(p, is_stack)
            for name, size in (("u", R), ("v", K)):
                drawn = torch.randn(*leading, size, device=p.device, dtype=torch.float32)
                state[name] = F.normalize(drawn, dim=-1)
        return state["u"], state["v"]


def _sizes(p: Tensor, is_stack: bool) -> tuple[tuple[int, ...], int, int]:
    leading = tuple(p.shape[:1]) if is_stack else ()
    R = p.shape[len(leading)]
    return leading, R, p[(0,) * (len(leading) + 1)].numel()


def _shape_factor(p: Tensor, is_stack: bool) -> float:
    _, R, K = _sizes(p, is_stack)
    return float((R / K) ** 0.5)


class Experts(nn.Module):
    """The mean of `count` small networks whose weights are stacks (E, R, K), on inputs (B, K)."""

    def __init__(self, count: int, inputs: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(count, hidden, inputs) / inputs**0.5)
        self.down = nn.Parameter(torch.randn(count, inputs, hidden) / hidden**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, K) for `x` (B, K)."""
        return torch.einsum("ehb,eih->bi", torch.relu(self.up @ x.t()), self.down) / len(self.up)


def main(steps: int = 200) -> list[float]:
    """Fit a small network with experts to a random teacher; print the loss now and then, and return all losses."""
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), Experts(4, 32, 24), nn.Linear(32, 8))
    teacher = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 8))
    stacks = list(student[2].parameters())
    others = [p for layer in (student[0], student[3]) for p in layer.parameters()]
    optimizer = SpectralDescent([{"params": others}, {"params": stacks, "stacks": True}])
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * (1 - step / steps)
        x = torch.randn(64, 16)
        loss = F.mse_loss(student(x), teacher(x).detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step}  loss {losses[-1]:.4f}")
    return losses


if __name__ == "__main__":
    main()
