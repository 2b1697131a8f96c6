"""One spectral-normed weight of a group: where it, u and v are, and its link to the group."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sagan_fast.kernels.launch import accumulator_dtype
from sagan_fast.kernels.spectral_norm.tables import is_dense
from sagan_fast.ops.library import is_transformed


class Link:
    """Points from a weight to its group and its index there; a copy of a link points to no group."""

    def __init__(self) -> None:
        self.group: Any = None  # a SpectralNormGroup, whose file imports this one
        self.index = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Link:
        return Link()

    def __reduce__(self) -> tuple[Any, ...]:
        return Link, ()

    def normalised(self, weight: Tensor, training: bool) -> Tensor | None:
        """Return W/sigma from the group; None if `weight` is not the group's, while compiling, and in transforms."""
        if self.group is None or torch.compiler.is_compiling() or is_transformed():
            return None
        return self.group.normalised(self.index, weight, training)

    def updates(self, training: bool) -> bool:
        """Return whether an access that the group does not serve updates u and v.

        Never under a transform, nor in a backward pass, which may compute activations again.
        """
        in_backward = not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
        if not training or is_transformed() or in_backward:
            return False
        return self.group is None or self.group.update == "forward" or not self.group.started

    def before_forward(self, module: nn.Module, inputs: Any) -> None:
        """Prepare the group for a forward of its whole model; replicas of DataParallel normalise their own copies."""
        if self.group is None or torch.compiler.is_compiling() or is_transformed():
            return
        if getattr(module, "_is_replica", False):
            return
        self.group.before_forward(module.training)


class Norm(Protocol):
    """The common attributes of our parametrization and of the holders of layers/foreign_spectral_norm.py."""

    link: Link
    dim: int
    n_power_iterations: int
    eps: float


Place = tuple[Any, str]
"""A module and the name of a tensor in it: looked up each time, since `.to()` and loading put other tensors there."""


@dataclass
class Member:
    """One weight: where it, u and v are, and how it is normalised.

    `v_at` is None where only u is kept, of any length: then v = Wᵀu/|Wᵀu|. `is_alive` says whether the module still
    uses this, and `undo` gives the weight back to the spectral norm it had. `sigma_at` is where a copy of sigma goes.
    With `own_evaluation` the module normalises by itself in evaluation.
    """

    name: str
    norm: Norm
    weight_at: Place
    u_at: Place
    v_at: Place | None
    v_first: bool
    is_alive: Callable[[], bool]
    undo: Callable[[], None]
    sigma_at: Place | None = None
    own_evaluation: bool = False

    @property
    def weight(self) -> Tensor:
        return getattr(*self.weight_at)

    @property
    def u(self) -> Tensor:
        u = getattr(*self.u_at)
        return u if u.ndim == 1 else u.view(-1)

    def vectors(self, update: bool) -> tuple[Tensor, Tensor]:
        """Return u (R,) and v (K,), to be updated in place if `update`."""
        if self.v_at is not None:
            return self.u, getattr(*self.v_at)
        matrix = rows_first(self.weight.detach(), self.norm.dim).flatten(1)
        if update:
            return self.u, matrix.new_zeros(matrix.shape[1], dtype=accumulator_dtype(matrix.dtype))
        matrix = matrix.to(accumulator_dtype(matrix.dtype))
        u = self.u.to(matrix.dtype)
        v = F.normalize(torch.mv(matrix.t(), u), dim=0, eps=self.norm.eps)
        return F.normalize(u, dim=0, eps=self.norm.eps), v

    def state(self) -> tuple[int, ...]:
        """Return numbers that change when the weight, u or v changes or moves."""
        tensors = (self.weight, self.u) if self.v_at is None else (self.weight, self.u, getattr(*self.v_at))
        return tuple(n for x in tensors for n in (x.data_ptr(), 0 if x.is_inference() else x._version))


def rows_first(weight: Tensor, dim: int) -> Tensor:
    """Return `weight` with its rows first and dense: itself, but for transposed convolutions."""
    weight = weight.movedim(dim, 0) if dim else weight
    return weight if is_dense(weight) else weight.contiguous()
