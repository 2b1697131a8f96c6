"""Normalises all spectral-normed weights of a model in one pass, whose result all accesses share."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sagan_fast.kernels.spectral_norm.tables import is_dense
from sagan_fast.ops.backends import choose_spectral_norm, too_large
from sagan_fast.ops.library import is_transformed
from sagan_fast.ops.spectral_norm import forward_all, gradient, split


class Link:
    """Points from a weight to its group and its index there; a copy of a link points to no group."""

    def __init__(self, group: SpectralNormGroup | None = None, index: int = 0) -> None:
        self.group, self.index = group, index

    def __deepcopy__(self, memo: dict[int, Any]) -> Link:
        return Link()

    def __reduce__(self) -> tuple[Any, ...]:
        return Link, ()

    def normalised(self, weight: Tensor) -> Tensor | None:
        """Return W/sigma from the group; None where `weight` is another, being compiled, or under a transform."""
        if self.group is None or torch.compiler.is_compiling() or is_transformed():
            return None
        return self.group.normalised(self.index, weight)

    def updates(self, training: bool) -> bool:
        """Return whether an access that the group does not serve updates u and v; never under a transform."""
        return training and not is_transformed() and (self.group is None or self.group.update == "forward")

    def before_forward(self, module: nn.Module, inputs: Any) -> None:
        """Update the group at a training forward of its whole model: the hook of `update="forward"`."""
        if self.group is None or not module.training:
            return
        if not torch.compiler.is_compiling() and not is_transformed():
            self.group.compute(update=True, fresh=True)


class Norm(Protocol):
    """The common attributes of our parametrization, our hook and our BigGAN-PyTorch method."""

    link: Link
    dim: int
    n_power_iterations: int
    eps: float


Place = tuple[Any, str]
"""A module and the name of a tensor in it: looked up each time, since `.to()` and loading put other tensors there."""


@dataclass
class Member:
    """One weight: where it, u and v are, and how it is normalised.

    `is_alive` says whether the module still uses this. `prepare` runs before u and v are used, and what it changes is
    taken as theirs; `after_step` runs after they were moved; `sigma_at` is where a copy of sigma goes then.
    """

    name: str
    norm: Norm
    weight_at: Place
    u_at: Place
    v_at: Place
    v_first: bool
    is_alive: Callable[[], bool] = lambda: True
    prepare: Callable[[], None] = lambda: None
    after_step: Callable[[], None] = lambda: None
    sigma_at: Place | None = None

    @property
    def weight(self) -> Tensor:
        return getattr(*self.weight_at)

    @property
    def vectors(self) -> tuple[Tensor, Tensor]:
        """u (R,) and v (K,); BigGAN-PyTorch keeps u as (1, R)."""
        u, v = getattr(*self.u_at), getattr(*self.v_at)
        return u if u.ndim == 1 else u.view(-1), v

    def state(self) -> tuple[int, ...]:
        """Return numbers that change when the weight, u or v changes or moves."""
        tensors = (self.weight, *self.vectors)
        return tuple(n for x in tensors for n in (x.data_ptr(), 0 if x.is_inference() else x._version))


def rows_first(weight: Tensor, dim: int) -> Tensor:
    """Return `weight` with its rows first and dense: itself, but for transposed convolutions."""
    weight = weight.movedim(dim, 0) if dim else weight
    return weight if is_dense(weight) else weight.contiguous()


class _Batch:
    """Members that are normalised in one pass, and the results of the last pass."""

    def __init__(self, members: list[Member], indices: list[int]) -> None:
        self.members, self.indices = members, indices
        self.flat: Tensor | None = None
        self.plain: list[Tensor] = []
        self.linked: tuple[Tensor, ...] = ()
        self.linked_flags: list[bool] = []

    def compute(self, update: bool, fresh: bool, backend: str, sigmas: Tensor | None = None) -> None:
        for member in self.members:
            member.prepare()
        weights = [rows_first(member.weight, member.norm.dim).detach() for member in self.members]
        us, vs = zip(*(member.vectors for member in self.members), strict=True)
        norm, v_first = self.members[0].norm, self.members[0].v_first
        if fresh:
            self.flat = None
        self.choice = choose_spectral_norm("fuse_spectral_norm", backend, weights)
        chosen = self.choice.backend
        self.flat, self.sigmas, self.u, self.v = forward_all(
            chosen, weights, us, vs, n_power_iterations=norm.n_power_iterations, eps=norm.eps, update=update,
            v_first=v_first, out_dtype=weights[0].dtype, out=self.flat, sigmas=sigmas,
        )  # fmt: skip
        if chosen == "triton":  # which writes without PyTorch's knowledge
            written = [self.flat, *us, *vs] if update else [self.flat]
            torch.autograd.graph.increment_version(written)
        # Detached, not plain views: they share the version with the flat tensor, so that a backward through weights of
        # the step before is refused as after any change in place, but no history.
        self.plain = [view.detach() for view in split(self.flat, weights)]
        self.linked = ()
        self.versions = [member.weight._version if not member.weight.is_inference() else 0 for member in self.members]
        if update:
            told = [(i, getattr(*member.sigma_at)) for i, member in enumerate(self.members) if member.sigma_at]
            if told:
                torch._foreach_copy_([place for _, place in told], [self.sigmas[i].view_as(place) for i, place in told])
            for member in self.members:
                member.after_step()
        self.states = [member.state() for member in self.members]

    def get(self, position: int) -> Tensor:
        member = self.members[position]
        weight = member.weight
        if torch.is_grad_enabled() and weight.requires_grad:
            if not self.linked or not self.linked_flags[position]:
                weights = [member.weight for member in self.members]
                self.linked_flags = [weight.requires_grad for weight in weights]
                self.linked = _SharedFunction.apply(_Snapshot(self), *weights)
            out = self.linked[position]
        else:
            out = self.plain[position]
        return out.movedim(0, member.norm.dim) if member.norm.dim else out


class _Snapshot:
    """What the gradient of one pass needs. save_for_backward would free it after the first backward."""

    def __init__(self, batch: _Batch) -> None:
        self.names = [member.name for member in batch.members]
        self.dims = [member.norm.dim for member in batch.members]
        self.backend, self.versions, self.plain = batch.choice.backend, batch.versions, batch.plain
        self.sigmas, self.u, self.v = batch.sigmas, batch.u, batch.v


class _SharedFunction(torch.autograd.Function):
    """Puts W/sigma of a batch, already computed, into the graph of its weights, for any number of backwards."""

    @staticmethod
    def forward(ctx: Any, snapshot: _Snapshot, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.snapshot, ctx.weights = snapshot, weights
        ctx.set_materialize_grads(False)
        return tuple(plain.detach() for plain in snapshot.plain)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        snapshot = ctx.snapshot
        for name, weight, version in zip(snapshot.names, ctx.weights, snapshot.versions, strict=True):
            if weight._version != version:
                raise RuntimeError(
                    f"spectral_norm: the weight of {name} must be unchanged between forward and backward, at version "
                    f"{version}, got version {weight._version}: it was modified by an inplace operation"
                )
        wanted = [grad if needed else None for grad, needed in zip(grads, ctx.needs_input_grad[1:], strict=True)]
        dense = [rows_first(weight, dim) for weight, dim in zip(ctx.weights, snapshot.dims, strict=True)]
        d_weights = gradient(snapshot.backend, snapshot.sigmas, snapshot.u, snapshot.v, wanted, dense)
        return None, *(
            d_weight.movedim(0, dim) if dim and d_weight is not None else d_weight
            for d_weight, dim in zip(d_weights, snapshot.dims, strict=True)
        )


class SpectralNormGroup:
    """All spectral-normed weights of a model, normalised together; `fuse_spectral_norm` makes it."""

    def __init__(self, members: list[Member], update: str, backend: str = "auto") -> None:
        self.update, self.backend = update, backend
        self._members = members
        self._batches: list[_Batch] = []
        self._places: dict[int, tuple[_Batch, int]] = {}
        self._signature: Any = None
        for index, member in enumerate(members):
            member.norm.link.group, member.norm.link.index = self, index

    def release(self) -> None:
        """Stop moving u and v at the model's forwards: another group takes the weights over."""

    @property
    def names(self) -> list[str]:
        """Names of the modules, as in `model.named_modules()`."""
        return [member.name for member in self._members if member.is_alive()]

    def __len__(self) -> int:
        return len(self.names)

    def step(self) -> None:
        """Update u and v of every weight and normalise it; call this once after each optimizer step.

        W/sigma is written in place, so finish the backward of earlier graphs first; afterwards it raises RuntimeError.
        """
        self.compute(update=True, fresh=self.update == "forward")

    def explain(self) -> list[str]:
        """Return one line for each pass: which weights it normalises, on which backend, and why."""
        self._refresh()
        lines = []
        for batch in self._batches:
            names = [member.name for member in batch.members]
            which = f"{len(names)} weights" if len(names) > 1 else names[0]
            lines.append(f"spectral norm of {which}: {batch.choice}")
        return lines

    def sigmas(self) -> dict[str, float]:
        """Return sigma of every weight by name; one small transfer from the device."""
        found = self.state_dict()
        values = torch.stack([sigma.float() for sigma in found.values()]).tolist() if found else []
        by_name = dict(zip(found, values, strict=True))
        return {name: by_name[name] for name in self.names}

    def state_dict(self) -> dict[str, Tensor]:
        """Return sigma of every weight by name, to be saved beside the model's state for an exact resumption.

        u and v are in the model's state, but a sigma computed from them again would be rounded differently.
        """
        self._refresh()
        return {
            self._members[index].name: sigma.clone()
            for batch in self._batches
            for index, sigma in zip(batch.indices, batch.sigmas, strict=True)
        }

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Take over what `state_dict` returned; call it after the model's own state is loaded.

        Raises ValueError if the names are not those of the group.
        """
        if set(state_dict) != set(self.names):
            raise ValueError(f"load_state_dict: state_dict must name {self.names}, got {list(state_dict)}")
        with torch.inference_mode(False), torch.no_grad():
            self._arrange()
            for batch in self._batches:
                saved = torch.stack([state_dict[member.name].to(member.weight.device) for member in batch.members])
                batch.compute(False, self.update == "forward", self.backend, saved)

    def normalised(self, index: int, weight: Tensor) -> Tensor | None:
        """Return W/sigma of weight `index`, or None if `weight` is not that one but a replica's or a substitute.

        It is computed again, with u and v as they are, only if something changed.
        """
        if weight is not self._members[index].weight:
            return None
        place = self._places.get(index)
        if place is None or self._members[index].state() != place[0].states[place[1]]:
            self.compute(update=False, fresh=self.update == "forward")
            place = self._places[index]
        return place[0].get(place[1])

    def _refresh(self) -> None:
        states = [state for batch in self._batches for state in batch.states]
        now = [member.state() for batch in self._batches for member in batch.members]
        if not self._batches or states != now:
            self.compute(update=False, fresh=self.update == "forward")

    def compute(self, update: bool, fresh: bool) -> None:
        """Normalise, after an update of u and v if `update`; into new memory if `fresh`: earlier graphs stay valid."""
        # Memory made in inference mode could not be used in training afterwards.
        with torch.inference_mode(False), torch.no_grad():
            self._arrange()
            for batch in self._batches:
                batch.compute(update, fresh, self.backend)

    def _arrange(self) -> None:
        """Put members that one pass can take together, again whenever one left the model, moved or was converted."""
        alive = [(index, member) for index, member in enumerate(self._members) if member.is_alive()]
        signature = [
            (index, member.weight.device, member.weight.dtype, member.weight.shape, member.weight.stride())
            for index, member in alive
        ]
        if signature == self._signature:
            return
        together: dict[Any, list[int]] = defaultdict(list)
        for index, member in alive:
            weight, norm = member.weight, member.norm
            where = (weight.device, weight.dtype, too_large(weight.movedim(norm.dim, 0)))
            together[where, member.v_first, norm.n_power_iterations, norm.eps].append(index)
        self._batches = [_Batch([self._members[i] for i in indices], indices) for indices in together.values()]
        self._places = {index: (batch, place) for batch in self._batches for place, index in enumerate(batch.indices)}
        self._signature = signature
