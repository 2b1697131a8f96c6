"""Puts W/sigma of a pass into the graph of its weights, in buckets whose gradients are computed together.

A bucket's gradients are ready once the backward pass has left its weights behind. So DistributedDataParallel can send
them while the backward pass goes on. In a process alone there is one bucket on a GPU: the fewest launches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sagan_fast.layers.spectral_norm_member import rows_first
from sagan_fast.ops.spectral_norm import gradient, taken


class Buckets:
    """The division of weights into buckets, consecutive in the order of their first use in a graph.

    `weights` are those of one pass; positions are theirs.
    """

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self.sizes = [weight.numel() * weight.element_size() for weight in weights]
        self._used: dict[int, None] = {}
        self._found: list[list[int]] = []

    def use(self, position: int) -> None:
        """Note the use of a weight in a graph."""
        self._used[position] = None

    def divide(self, bucket_bytes: float) -> None:
        """Divide anew: from the last weight used backwards, a bucket is full when it has `bucket_bytes`."""
        everything = range(len(self.sizes))
        if bucket_bytes == math.inf:
            self._found = [list(everything)]
            return
        order = [*self._used, *(position for position in everything if position not in self._used)]
        found: list[list[int]] = [[]]
        size = 0
        for position in reversed(order):
            if size >= bucket_bytes:
                found.append([])
                size = 0
            found[-1].append(position)
            size += self.sizes[position]
        self._found = [sorted(bucket) for bucket in found]

    def of(self, position: int) -> list[int]:
        """Return the positions in the bucket of the weight at `position`."""
        return next(bucket for bucket in self._found if position in bucket)


class Pass:
    """What the gradient of a pass needs: its results, flat or by position. save_for_backward would free them.

    `versions` are the weights' when the pass was made.
    """

    def __init__(
        self, names: list[str], dims: list[int], backend: str, plain: list[Tensor], versions: list[int], sigmas: Tensor,
        u: Tensor, v: Tensor,
    ) -> None:  # fmt: skip
        self.names, self.dims, self.backend, self.plain, self.versions = names, dims, backend, plain, versions
        self.sigmas, self.u, self.v = sigmas, u, v


class Graph:
    """W/sigma of a pass in the graph of its weights, made bucket by bucket when a weight is first used.

    All uses up to a backward share one node, so that their gradients are summed before it. After that backward the
    next use makes another: of all that is ready, autograd computes first what was made last, so an older node would
    wait for the whole backward.
    """

    def __init__(self, made: Pass, buckets: Buckets, bucket_bytes: Callable[[], float]) -> None:
        self.made, self.buckets, self.bucket_bytes = made, buckets, bucket_bytes
        self._places: dict[int, tuple[_Node, Tensor]] = {}

    def get(self, position: int, weights: Sequence[Tensor]) -> Tensor:
        """Return W/sigma of the weight at `position`; `weights` are those of all positions."""
        self.buckets.use(position)
        node, out = self._places.get(position, (None, None))
        if node is None or node.is_spent or not node.flags[position]:
            if all(node.is_spent for node, _ in self._places.values()):
                self.buckets.divide(self.bucket_bytes())
            bucket = self.buckets.of(position)
            node = _Node(self.made, {index: weights[index].requires_grad for index in bucket})
            outputs = _SharedFunction.apply(node, *(weights[index] for index in bucket))
            self._places.update({index: (node, out) for index, out in zip(bucket, outputs, strict=True)})
            _, out = self._places[position]
        return out  # type: ignore[return-value]


class _Node:
    """A bucket in the graph; it holds none of the outputs, which hold it."""

    def __init__(self, made: Pass, flags: dict[int, bool]) -> None:
        self.made, self.flags, self.is_spent = made, flags, False


class _SharedFunction(torch.autograd.Function):
    """Puts W/sigma of a bucket, already computed, into the graph of its weights, for any number of backwards."""

    @staticmethod
    def forward(ctx: Any, node: _Node, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.node, ctx.weights = node, weights
        ctx.set_materialize_grads(False)
        return tuple(node.made.plain[position].detach() for position in node.flags)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        made, bucket = ctx.node.made, list(ctx.node.flags)
        ctx.node.is_spent = True
        dims = [made.dims[position] for position in bucket]
        for position, weight in zip(bucket, ctx.weights, strict=True):
            version = made.versions[position]
            if weight._version != version:
                raise RuntimeError(
                    f"spectral_norm: the weight of {made.names[position]} must be unchanged between forward and "
                    f"backward, at version {version}, got version {weight._version}: it was modified by an inplace "
                    "operation"
                )
        wanted = [grad if needed else None for grad, needed in zip(grads, ctx.needs_input_grad[1:], strict=True)]
        dense = [rows_first(weight, dim) for weight, dim in zip(ctx.weights, dims, strict=True)]
        rows = [len(plain) for plain in made.plain]
        columns = [plain[0].numel() for plain in made.plain]
        u, v = taken(made.u, rows, bucket), taken(made.v, columns, bucket)
        sigmas = made.sigmas if len(bucket) == len(rows) else torch.stack([made.sigmas[i] for i in bucket])
        d_weights = gradient(made.backend, sigmas, u, v, wanted, dense)
        return None, *(
            d_weight.movedim(0, dim) if dim and d_weight is not None else d_weight
            for d_weight, dim in zip(d_weights, dims, strict=True)
        )
