"""A stand-in for CUDA graphs on the CPU: operator calls are recorded, and replayed on the same memory.

Like a graph it holds addresses and numbers, not Python: what Python computed while it was recorded stays as it was
then. Recording changes no memory that was there before, and a call that would wait for a GPU is refused. Versions of
tensors do not move in a replay.
"""

from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from sagan_fast.kernels.spectral_norm import eager
from sagan_fast.layers import folded_weight, spectral_norm_group
from sagan_fast.models import generator as models

WAITING = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "_unique2", "item"}
"""Operators whose result, or its shape, the host must see."""
UNTOLD = {"native_batch_norm": (3, 4), "batch_norm_update_stats": (1, 2)}
"""Operators that write arguments of which their schema does not say so, and which."""


def as_on_cuda(monkeypatch):
    """Leave out what the networks look at or keep on the CPU alone."""
    monkeypatch.setattr(models, "_all_within", lambda y, num_classes: True)
    monkeypatch.setattr(folded_weight, "_can_be_kept", lambda weight: False)
    monkeypatch.setattr(spectral_norm_group._Batch, "is_outdated", lambda batch: False)
    monkeypatch.setattr(eager, "_can_be_asked", lambda tensor: False)


def name_of(func):
    return func._schema.name.partition("::")[2]


def written_by(func, args, kwargs):
    """Return the tensors among the arguments that `func` writes."""
    schema = func._schema.arguments
    given = [args[i] if i < len(args) else kwargs.get(each.name) for i, each in enumerate(schema)]
    told = [value for each, value in zip(schema, given, strict=True) if each.alias_info and each.alias_info.is_write]
    told += [args[i] for i in UNTOLD.get(name_of(func), ())]
    return [leaf for leaf in tree_flatten(told)[0] if isinstance(leaf, torch.Tensor)]


def has_mask(args):
    """Return whether booleans choose the elements: their number decides the shape."""
    return any(isinstance(leaf, torch.Tensor) and leaf.dtype == torch.bool for leaf in tree_flatten(args[1:2])[0])


@contextmanager
def without_numbers():
    """Refuse what hands the numbers of a tensor to the host and is no call of an operator."""

    def refuse(tensor, *args):
        raise RuntimeError("operation not permitted when stream is capturing: the host asks for numbers")

    with pytest.MonkeyPatch.context() as patch:
        for name in ("tolist", "numpy"):
            patch.setattr(torch.Tensor, name, refuse)
        yield


class _Recording(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls, self.before, self.written, self.made = [], {}, [], set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if name_of(func) in WAITING or name_of(func).startswith("index") and has_mask(args):
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        for tensor in written_by(func, args, kwargs):
            self.written.append(tensor)
            place = tensor.untyped_storage()
            if place.data_ptr() not in self.made and place.data_ptr() not in self.before:
                self.before[place.data_ptr()] = place, place.clone()
        out = func(*args, **kwargs)
        returned = out if isinstance(out, (tuple, list)) else (out,)
        new = []
        if not any(each.alias_info for each in func._schema.returns):
            new = [each for each in tree_flatten(list(returned))[0] if isinstance(each, torch.Tensor)]
        self.made |= {each.untyped_storage().data_ptr() for each in new}
        self.calls.append((func, args, kwargs, new))
        return out

    def restore(self):
        for place, content in self.before.values():
            place.copy_(content)

    def replay(self):
        with torch.no_grad(), versions_kept(self.written), torch.autocast("cpu", enabled=False):
            for func, args, kwargs, new in self.calls:
                out = func(*args, **kwargs)
                again = [each for each in tree_flatten(out)[0] if isinstance(each, torch.Tensor)] if new else []
                for place, value in zip(new, again, strict=True):
                    place.detach().copy_(value)


@contextmanager
def versions_kept(tensors):
    """Give `tensors` the versions back that they had."""
    tensors = tuple(tensors)
    versions = tuple(tensor._version for tensor in tensors)
    yield
    torch._C._autograd._unsafe_set_version_counter(tensors, versions)


class OperatorRecorder:
    """Does for `CapturedStep` on the CPU what `CudaRecorder` does on a GPU; `records` counts its recordings."""

    def __init__(self):
        self.records = self.warm_ups = self.replays = 0

    @contextmanager
    def warming_up(self):
        self.warm_ups += 1
        yield

    def record(self, function):
        recording = _Recording()
        try:
            with recording, without_numbers():
                values = function()
        finally:
            recording.restore()
        self.records += 1

        def replay():
            self.replays += 1
            recording.replay()

        return replay, values
