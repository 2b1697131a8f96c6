"""Normalises all spectral-normed weights of a model in one pass, whose result all accesses share."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sagan_fast.kernels.spectral_norm.eager import matrix_of
from sagan_fast.layers.spectral_norm_gradient import Buckets, Graph, Pass
from sagan_fast.layers.spectral_norm_member import Member, rows_first
from sagan_fast.ops.backends import choose_spectral_norm, too_large
from sagan_fast.ops.spectral_norm import forward_all, split

CPU_BUCKET = 16 * 2**20
"""Bytes of a bucket of gradients on the CPU, in a process alone: half of the largest block that glibc keeps.

Larger ones go back to the system when they are freed, and new memory costs a page fault for every 4 KB.
"""


class _Batch:
    """Members that are normalised in one pass, and the results of the last pass."""

    def __init__(self, members: list[Member], indices: list[int], bucket_bytes: Callable[[], float]) -> None:
        self.members, self.indices, self.bucket_bytes = members, indices, bucket_bytes
        self.flat: Tensor | None = None
        self.pool: list[Tensor] = []  # for fresh results: new memory would cost a page fault for every 4 KB
        self.plain: list[Tensor] = []
        self.buckets = Buckets([member.weight for member in members])
        self.graph: Any = None  # until there is a result

    def compute(self, update: bool, fresh: bool, backend: str, sigmas: Tensor | None = None) -> None:
        weights = [rows_first(member.weight, member.norm.dim).detach() for member in self.members]
        us, vs = zip(*(member.vectors(update) for member in self.members), strict=True)
        norm, v_first = self.members[0].norm, self.members[0].v_first
        if fresh:
            self.flat = self._free_memory()
        self.choice = choose_spectral_norm("fuse_spectral_norm", backend, weights)
        chosen = self.choice.backend
        self.flat, self.sigmas, u, v = forward_all(
            chosen, weights, us, vs, n_power_iterations=norm.n_power_iterations, eps=norm.eps, update=update,
            v_first=v_first, out_dtype=weights[0].dtype, out=self.flat, sigmas=sigmas,
        )  # fmt: skip
        if fresh:
            self.pool = [self.flat, *(flat for flat in self.pool if flat is not self.flat)][:2]
        if chosen == "triton":  # which writes without PyTorch's knowledge
            written = [self.flat, *us, *vs] if update else [self.flat]
            torch.autograd.graph.increment_version(written)
        # Detached, not plain views: they share the version with the flat tensor, so that a backward through weights of
        # the step before is refused as after any change in place, but no history.
        self.plain = [view.detach() for view in split(self.flat, weights)]
        versions = [member.weight._version if not member.weight.is_inference() else 0 for member in self.members]
        names, dims = [member.name for member in self.members], [member.norm.dim for member in self.members]
        made = Pass(names, dims, chosen, self.plain, versions, self.sigmas, u, v)
        self.graph = Graph(made, self.buckets, self.bucket_bytes)
        if update:
            told = [(i, getattr(*member.sigma_at)) for i, member in enumerate(self.members) if member.sigma_at]
            if told:
                torch._foreach_copy_([place for _, place in told], [self.sigmas[i].view_as(place) for i, place in told])
        self.seen = self._some_elements()
        self.states = [member.state() for member in self.members]
        self.kept = [member.weight for member in self.members]  # alive, so that no other weight gets its address

    def _free_memory(self) -> Tensor | None:
        """Return memory of an earlier result that no graph and no user holds any more, or None."""
        self.plain, self.graph, self.flat = [], None, None
        for flat in self.pool:
            if torch._C._storage_Use_Count(flat.untyped_storage()._cdata) == 2:  # type: ignore[attr-defined]  # the two here
                return flat
        return None

    def is_outdated(self) -> bool:
        """Return whether weights were written through `.data`, as far as 64 elements of each show it."""
        return not torch.equal(self._some_elements(), self.seen)

    def _some_elements(self) -> Tensor:
        dense = (rows_first(member.weight.detach(), member.norm.dim) for member in self.members)
        return torch.cat([matrix_of(each).view(-1)[:: max(1, each.numel() // 64)] for each in dense])

    def get(self, position: int) -> Tensor:
        member = self.members[position]
        if torch.is_grad_enabled() and member.weight.requires_grad:
            out = self.graph.get(position, [member.weight for member in self.members])
        else:
            out = self.plain[position]
        return out.movedim(0, member.norm.dim) if member.norm.dim else out


class SpectralNormGroup:
    """All spectral-normed weights of a model, normalised together; `fuse_spectral_norm` makes it.

    With several processes the gradients come in buckets of `bucket_cap_mb` MiB, so that DistributedDataParallel can
    send the first ones while the backward pass goes on.
    """

    def __init__(self, members: list[Member], update: str, backend: str = "auto") -> None:
        self.update, self.backend = update, backend
        self.bucket_cap_mb = 25.0  # as DistributedDataParallel's
        self.started = False  # whether u and v have moved: until then the first training access moves them
        self.release: Callable[[], None] = lambda: None  # removes the hook of the model's forward
        self._members = members
        self._batches: list[_Batch] = []
        self._places: dict[int, tuple[_Batch, int]] = {}
        self._alone: dict[int, _Batch] = {}  # weights that moved alone since the last pass
        self._unused: set[int] = set()  # with update="forward": those that moved and were not used since,
        self._used: set[int] = set()  # and those used since the last forward of the model
        self._signature: Any = None
        for index, member in enumerate(members):
            member.norm.link.group, member.norm.link.index = self, index

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

    def refresh(self) -> None:
        """Normalise every weight again, with u and v as they are: for weights changed through `.data`.

        PyTorch does not see such writes. At a forward of the model the group finds those that change most of a weight.
        """
        self.compute(update=False, fresh=self.update == "forward")

    def undo(self) -> None:
        """Give every weight back to the spectral norm it had before, with u and v where they are now."""
        self.release()
        for member in self._members:
            member.norm.link.group = None
            if member.is_alive():
                member.undo()
        self._members, self._batches = [], []

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
        self.started = True

    def before_forward(self, training: bool) -> None:
        """Do what a forward of the whole model asks for: with update="forward" a pass, else a look for unseen writes.

        The look needs a transfer from a GPU, and takes place there only in evaluation.
        """
        if self.update == "forward":
            if training or not all(member.own_evaluation for member in self._members):
                used, self._used = self._used, set()
                self.compute(update=training, fresh=True, which=used)
            return
        for batch in self._batches:
            if batch.flat is None or batch.flat.is_cuda and (training or torch.cuda.is_current_stream_capturing()):
                continue
            if self._signature != self._now():
                return  # something moved or left: the next access sees it
            if batch.is_outdated():
                return self.refresh()

    def normalised(self, index: int, weight: Tensor, training: bool) -> Tensor | None:
        """Return W/sigma of weight `index`, or None if `weight` is not that one but a replica's or a substitute.

        It is computed again, with u and v as they are, only if something changed. In training u and v move first where
        the unfused model's would: with update="step" before the first step, with "forward" at every use of the weight.
        """
        member = self._members[index]
        if weight is not member.weight:
            return None
        if training and self.update == "step" and not self.started:
            self.compute(update=True, fresh=False)
        elif self.update == "forward":
            if training and index not in self._unused and torch._C._current_graph_task_id() == -1:  # in no backward
                self._compute_alone(index, update=True)
            self._unused.discard(index)
            self._used.add(index)
        place = (self._alone[index], 0) if index in self._alone else self._places.get(index)
        if place is None or member.state() != place[0].states[place[1]]:
            if self.update == "forward":
                return self._compute_alone(index, update=False).get(0)
            self.compute(update=False, fresh=False)
            place = self._places[index]
        return place[0].get(place[1])

    def _compute_alone(self, index: int, update: bool) -> _Batch:
        """Normalise one weight: used apart from a forward of the model, again in the same one, or for the first time.

        A pass moves only what the last forward used: a layer that the model never calls must not move.
        """
        with torch.inference_mode(False), torch.no_grad():
            self._alone[index] = batch = _Batch([self._members[index]], [index], self._bucket_bytes)
            batch.compute(update, True, self.backend)
        return batch

    def _bucket_bytes(self) -> float:
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            return self.bucket_cap_mb * 2**20
        is_on_cpu = all(member.weight.device.type == "cpu" for member in self._members)
        return CPU_BUCKET if is_on_cpu else math.inf

    def _refresh(self) -> None:
        states = [state for batch in self._batches for state in batch.states]
        now = [member.state() for batch in self._batches for member in batch.members]
        if self.update == "forward" or not self._batches or states != now:
            self.compute(update=False, fresh=self.update == "forward")

    def compute(self, update: bool, fresh: bool, which: set[int] | None = None) -> None:
        """Normalise, after an update of u and v if `update`; into new memory if `fresh`: earlier graphs stay valid.

        `which` are the members meant, by default all.
        """
        # Memory made in inference mode could not be used in training afterwards.
        with torch.inference_mode(False), torch.no_grad():
            self._arrange(which)
            for batch in self._batches:
                batch.compute(update, fresh, self.backend)
        self._alone.clear()
        if update:
            self.started, self._unused = True, set(self._places)

    def _now(self, which: set[int] | None = None) -> list[Any]:
        return [
            (index, member.weight.device, member.weight.dtype, member.weight.shape, member.weight.stride())
            for index, member in enumerate(self._members)
            if (which is None or index in which) and member.is_alive()
        ]

    def _arrange(self, which: set[int] | None = None) -> None:
        """Put members that one pass can take together, again whenever one left the model, moved or was converted."""
        signature = self._now(which)
        if signature == self._signature:
            return
        together: dict[Any, list[int]] = defaultdict(list)
        for index, *_ in signature:
            member = self._members[index]
            weight, norm = member.weight, member.norm
            where = (weight.device, weight.dtype, too_large(weight.movedim(norm.dim, 0)))
            together[where, member.v_first, norm.n_power_iterations, norm.eps].append(index)
        self._batches = [
            _Batch([self._members[i] for i in indices], indices, self._bucket_bytes) for indices in together.values()
        ]
        self._places = {index: (batch, place) for batch in self._batches for place, index in enumerate(batch.indices)}
        self._signature = signature
