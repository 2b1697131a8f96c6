"""`accelerate`: attention, conditional batch norm and spectral norm of others' models, by ours in place."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import nn
from torch.nn.utils import parametrizations, parametrize

from sagan_fast.interop.attention_forms import FusedAttention, at, convolution_path
from sagan_fast.interop.batch_norm_forms import FusedNorm, parts_of
from sagan_fast.interop.batch_norm_trials import norm_form
from sagan_fast.interop.trials import Mismatch, attention_form, spectral_norm_difference
from sagan_fast.layers.conditional_batch_norm import ConditionalBatchNorm2d
from sagan_fast.layers.effective_weight import has_hooks, is_direct, is_pointwise
from sagan_fast.layers.foreign_spectral_norm import foreign_norms, unrecognised
from sagan_fast.layers.instance_class import change_class, restore_class
from sagan_fast.layers.self_attention import SelfAttention2d
from sagan_fast.layers.spectral_norm import GroupedForward, group_members, group_of
from sagan_fast.layers.spectral_norm_group import SpectralNormGroup
from sagan_fast.words import counted

SUMMED = {"batch norm": ("module", "one op each"), "spectral norm": ("weight", "in one pass")}
"""What the report shows in one line, however many there are: what they are, and how they are computed now."""

_LOOKS_LIKE_ATTENTION = re.compile(r"attn|attention|non_?local|query|theta", re.IGNORECASE)


@dataclass
class Row:
    """What happened to one module. `difference` is the largest relative one of outputs and gradients, in float64."""

    name: str
    what: str
    swapped: bool
    why: str
    difference: float = 0.0


@dataclass
class Report:
    """What `accelerate` did. `print` shows it as a table, and `undo` restores the model bit for bit."""

    rows: list[Row] = field(default_factory=list)
    groups: list[SpectralNormGroup] = field(default_factory=list)
    _changed: list[nn.Module] = field(default_factory=list)

    @property
    def swapped(self) -> list[str]:
        """Names of the modules that are computed by sagan_fast now."""
        return [row.name for row in self.rows if row.swapped]

    @property
    def left(self) -> dict[str, str]:
        """Names of the modules that look like one of the three and stay as they are, with the reasons."""
        return {row.name: row.why for row in self.rows if not row.swapped}

    @property
    def largest_difference(self) -> float:
        """The largest relative difference of what was swapped."""
        return max((row.difference for row in self.rows if row.swapped), default=0.0)

    def _swap(self, module: nn.Module, cls: type, name: str, what: str, said: str, difference: float) -> None:
        change_class(module, cls)
        self._changed.append(module)
        self.rows.append(Row(name, what, True, f"{said}; largest difference {difference:.1g}", difference))

    def undo(self) -> None:
        """Give every module back what computed it before; u and v stay where training has moved them."""
        for group in self.groups:
            group.undo()
        for module in self._changed:
            restore_class(module)
            for name in ("_attention_form", "_attention_choice", "_norm_form"):
                module.__dict__.pop(name, None)
        self.groups, self._changed = [], []

    def __str__(self) -> str:
        shown = [row for row in self.rows if not (row.swapped and row.what in SUMMED)]
        lines = [(row.name, row.what, row.why if row.swapped else f"left alone: {row.why}") for row in shown]
        for what, (thing, how) in SUMMED.items():
            found = [row.difference for row in self.rows if row.swapped and row.what == what]
            if found:
                lines.append((counted(len(found), thing), what, f"{how}; largest difference {max(found):.1g}"))
        if not lines:
            return "accelerate found no attention, conditional batch norm or spectral norm"
        lines.insert(0, ("module", "what", "result"))
        widths = [max(len(line[i]) for line in lines) for i in range(2)]
        return "\n".join(f"{name:{widths[0]}}  {what:{widths[1]}}  {said}" for name, what, said in lines)


def accelerate(
    model: nn.Module, *, attention: bool = True, spectral_norm: bool = True, batch_norm: bool = True,
    strict: bool = False,
) -> Report:  # fmt: skip
    """Let sagan_fast compute self-attention, spectral norm and conditional batch norm of `model`, in place.

    Returns what was done. Attention blocks are found by their structure: 1x1 convolutions to queries, keys and values,
    perhaps one for the output, and a scalar. So is conditional batch norm: linear layers or embeddings give gain and
    bias, and a batch norm without them, or the module itself, keeps running averages. Spectral norm is that of torch
    (both), BigGAN-PyTorch, mmgeneration, mimicry, and the older wrapper and hook. Each is tried in float64 on a copy,
    on random weights and a map that is not square, and changed only if outputs, gradients and running averages agree to
    1e-10; otherwise it stays as it is, and the report says why. u and v move at every use in training, as before
    (`fuse_spectral_norm(update="forward")`).

    Modules, parameters, optimizers, keys of the state dict, hooks, `isinstance`, copies and replicas stay what they
    are. A map that a block returns beside its output is computed only if it is used.

    With `strict` anything that is left raises ValueError, and the model is as it was.
    """
    report = Report()
    if attention:
        _accelerate_attention(model, report)
    if batch_norm:
        _accelerate_batch_norm(model, report)
    if spectral_norm:
        _accelerate_spectral_norm(model, report)
    if strict and report.left:
        report.undo()
        left = "; ".join(f"{name}: {why}" for name, why in report.left.items())
        raise ValueError(
            "accelerate: model must have no attention, conditional batch norm or spectral norm of another form, got "
            + left
        )
    return report


def _accelerate_attention(model: nn.Module, report: Report) -> None:
    for name, module in model.named_modules():
        name = name or type(module).__name__
        if isinstance(module, (SelfAttention2d, FusedAttention)):
            continue
        paths = {key: path for key, child in module.named_children() if (path := convolution_path(child)) is not None}
        gammas = [key for key, p in module._parameters.items() if p is not None and p.numel() == 1]
        pointwise = all(is_pointwise(_convolution(module, (key, *path))) for key, path in paths.items())
        looks = any(_LOOKS_LIKE_ATTENTION.search(word) for word in (type(module).__name__, *paths))
        if len(paths) not in (3, 4) or not (looks or (gammas and pointwise)):
            continue
        try:
            _check(module, [(key, *path) for key, path in paths.items()], gammas)
            form, difference = attention_form(module, [(key, *path) for key, path in paths.items()], gammas)
        except Mismatch as mismatch:
            report.rows.append(Row(name, "attention", False, str(mismatch)))
            continue
        said = "pooled" if form.pool else "unpooled"
        said += ", with an output projection" if form.o else ""
        said += ", its map on demand" if form.returns else ""
        module._attention_form = form  # type: ignore[assignment]
        report._swap(module, FusedAttention, name, "attention", said, difference)


def _accelerate_batch_norm(model: nn.Module, report: Report) -> None:
    for name, module in model.named_modules():
        if isinstance(module, (ConditionalBatchNorm2d, FusedNorm)) or (parts := parts_of(module)) is None:
            continue
        name = name or type(module).__name__
        try:
            form, difference = norm_form(module, parts)
        except Mismatch as mismatch:
            report.rows.append(Row(name, "batch norm", False, str(mismatch)))
            continue
        module._norm_form = form  # type: ignore[assignment]
        report._swap(module, FusedNorm, name, "batch norm", "1 + gain" if form.one_plus else "gain", difference)


def _convolution(module: nn.Module, path: tuple[str, ...]) -> nn.Module:
    conv = at(module, path)
    return getattr(conv, "module", conv)


def _check(module: nn.Module, paths: list[tuple[str, ...]], gammas: list[str]) -> None:
    """Raise Mismatch for what is left alone without a trial."""
    if "forward" in module.__dict__:
        raise Mismatch("its forward was replaced on the instance")
    if not gammas:
        raise Mismatch("it has no scalar that weighs the attention")
    for path in paths:
        conv, name = at(module, path), ".".join(path)
        if not is_pointwise(_convolution(module, path)):
            raise Mismatch(f"{name} is not a plain 1x1 convolution (kernel, stride, padding or groups)")
        if any(has_hooks(at(module, path[:i])) for i in range(1, len(path) + 1)):
            raise Mismatch(f"{name} has hooks, which would not run")
        if getattr(conv, "num_svs", 1) != 1:
            raise Mismatch(f"{name} keeps {conv.num_svs} singular values")
        if not is_direct(conv):
            raise Mismatch(f"{name} has a forward of its own, of the unknown class {type(conv).__name__}")


def _accelerate_spectral_norm(model: nn.Module, report: Report) -> None:
    good: dict[str, list[Row]] = {}
    taken = set()
    for name, module in model.named_modules():
        if group_of(module) is not None or any(group_of(child) is not None for child in _chain(module)):
            taken.add(id(module))
            continue
        skipped: list[str] = []
        tensors = _normed(module, skipped)
        label = name or type(module).__name__
        for said in skipped:
            report.rows.append(Row(label, "spectral norm", False, said.partition(": ")[2]))
        taken |= {id(module)} if tensors or skipped else set()
        if isinstance(inner := module._modules.get("module"), nn.Module) and tensors:
            taken.add(id(inner))
        try:
            rows = [Row(label, "spectral norm", True, "", spectral_norm_difference(module, each)) for each in tensors]
        except Mismatch as mismatch:
            report.rows.append(Row(label, "spectral norm", False, str(mismatch)))
            continue
        except Exception as error:  # anything that the module's own code may raise
            report.rows.append(Row(label, "spectral norm", False, f"{type(error).__name__}: {error}"))
            continue
        if rows:
            good[name] = rows
    for name in unrecognised(model, taken):
        report.rows.append(Row(name, "spectral norm", False, "it looks spectral-normed, in a way that is not known"))
    for prefix, root in _roots(model):
        inside = {name for name in good if name == prefix or name.startswith(prefix + "." if prefix else "")}
        if not inside:
            continue
        start = len(prefix) + 1 if prefix else 0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wanted = {name[start:] for name in inside}
            report.groups.append(group_members(root, "forward", "auto", wanted.__contains__))
        report.rows += [row for name in good if name in inside for row in good[name]]


def _chain(module: nn.Module) -> list[nn.Module]:
    if not parametrize.is_parametrized(module):
        return []
    return [part for chain in module.parametrizations.values() for part in chain]  # type: ignore[union-attr,operator]


def _normed(module: nn.Module, skipped: list[str]) -> list[str]:
    """Return the names of the tensors of `module` that a known spectral norm normalises; nothing is changed."""
    found = []
    if parametrize.is_parametrized(module):
        for tensor, chain in module.parametrizations.items():  # type: ignore[union-attr,operator]
            if hasattr(chain[0], "_u") and isinstance(chain[0], (GroupedForward, parametrizations._SpectralNorm)):
                found.append(tensor)
    return found + [tensor for tensor, _ in foreign_norms("", module, skipped.append)]


def _roots(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules whose forwards are called: `model`, or those in it if it is a list or dictionary of them."""
    if not isinstance(model, (nn.ModuleList, nn.ModuleDict)):
        yield prefix, model
        return
    for name, child in model.named_children():
        yield from _roots(child, f"{prefix}.{name}" if prefix else name)
