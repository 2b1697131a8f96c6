"""Begins a run from the weights of another one: other classes, sizes, options and data are allowed."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sagan_fast.errors import InputError
from sagan_fast.training.state import TrainState
from sagan_fast.words import counted, list_some

NETWORKS = ("generator", "discriminator", "ema")


def initialize(state: TrainState, content: Mapping[str, Any], class_names: Sequence[str], path: Path) -> list[str]:
    """Give the networks of `state` the weights in the checkpoint `content` that fit; return sentences about the rest.

    What is looked up by class goes by the names of the classes: `class_names` are those of the data, in order. A class
    that the checkpoint does not have begins as the mean of its classes. Where names are missing, classes go by number
    if there are as many. Optimizers, the step and moving averages of scores are left as they are.

    Raises InputError if no weight fits; `path` is the name of the checkpoint in sentences.
    """
    old = [str(name) for name in content.get("class_names", ())]
    order = class_order(old, class_names, int(content["config"].get("num_classes", 0)))
    said = [f"weights from {path}, step {content['step']}; the optimizers begin anew"]
    left: list[str] = []
    for name in NETWORKS:
        network: nn.Module = getattr(state, name)
        saved = content[name]
        tables = {f"{key}." for key, module in network.named_modules() if isinstance(module, nn.Embedding)}
        now, taken = network.state_dict(), 0
        for key, tensor in now.items():
            by_class = any(key.startswith(table) for table in tables)
            value = _of_classes(saved.get(key), order, key) if by_class else saved.get(key)
            if value is not None and value.shape == tensor.shape:
                now[key] = value
                taken += 1
            else:
                left.append(f"{name}.{key}")
        if not taken:
            raise InputError(f"no weight in {path} fits the {name} of this run: their channels or sizes differ")
        for table in tables:
            _turn_u(now, table)
        network.load_state_dict(now)
    state.g_spectral.refresh()
    state.d_spectral.refresh()
    if left:
        said.append(f"{counted(len(left), 'tensor')} did not fit and begin anew: {list_some(left, 3)}")
    if order is not None and old and class_names:
        new, gone = ([name for name in a if name not in b] for a, b in ((class_names, old), (old, class_names)))
        if new:
            said.append(f"classes that it does not have begin as the mean of its classes: {list_some(new)}")
        if gone:
            said.append(f"its classes that the data does not have are left out: {list_some(gone)}")
    return said


def class_order(old: Sequence[str], new: Sequence[str], num_old: int) -> list[int | None] | None:
    """Return for each class of `new` its number among `old`, None for one that is not there; None if they are equal.

    Without names of either, classes go by number where there are as many, and else none is there.
    """
    if list(old) == list(new) or not new:
        return None
    if not old:
        return None if num_old == len(new) else [None] * len(new)
    places = {name: number for number, name in enumerate(old)}
    return [places.get(name) for name in new]


def _of_classes(value: Tensor | None, order: Sequence[int | None] | None, key: str) -> Tensor | None:
    """Return the rows of a table for the classes in `order`; v of spectral norm has no rows, and stays."""
    if value is None or order is None or key.endswith("._v"):
        return value
    mean = value.float().mean(0).to(value.dtype)
    return torch.stack([mean if place is None else value[place] for place in order])


def _turn_u(tensors: dict[str, Tensor], table: str) -> None:
    """Set u of a spectral-normed table to what one power iteration gives for its rows and its v."""
    prefix = f"{table}parametrizations.weight."
    weight, v = tensors.get(f"{prefix}original"), tensors.get(f"{prefix}0._v")
    if weight is not None and v is not None:
        tensors[f"{prefix}0._u"] = F.normalize(weight.detach().float().cpu() @ v.float().cpu(), dim=0).to(v.device)
