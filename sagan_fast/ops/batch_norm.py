"""Batch norm with one gain and bias a channel, an image or a class, and ReLU, with a choice of backends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sagan_fast.kernels.batch_norm import cpu
from sagan_fast.kernels.checks import check_ndim, check_same_device, check_shape
from sagan_fast.kernels.spectral_norm.tables import is_dense
from sagan_fast.ops.attention import gradients
from sagan_fast.ops.backends import choose_batch_norm
from sagan_fast.ops.derivatives import is_old_batch
from sagan_fast.ops.library import LIBRARY, define, is_plain, is_transformed

_OP = "conditional_batch_norm"


class Sync(NamedTuple):
    """How the processes of a job share the statistics of a batch.

    `gather` returns the tensors of all processes, stacked in one order everywhere, (processes, ...). `add` makes a
    tensor the sum of those of all processes, in place.
    """

    gather: Callable[[Tensor], Tensor]
    add: Callable[[Tensor], object]


def conditional_batch_norm(
    x: Tensor,
    gain: Tensor | None = None,
    bias: Tensor | None = None,
    y: Tensor | None = None,
    *,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    relu: bool = False,
    one_plus: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Return gain * (x - mean)/sqrt(var + eps) + bias, (B, C, H, W), in the dtype of `x`; its ReLU with `relu`.

    `gain` and `bias` are (C,), one for all images; (B, C), one an image; or, with classes `y` (B,) int64, tables
    (num_classes, C). None stands for 1 and 0. `one_plus` takes 1 + gain, as BigGAN-PyTorch and PyTorch-StudioGAN do.
    With `training`, mean and biased variance are those of the batch, and `running_mean` and `running_var` (C,) move by
    `momentum`; without, they are the statistics. Source: Dumoulin et al. 2017, equation 5.

    `backend`: "cpu", for single and double precision there, takes one op forward and one backward, and keeps `x`, the
    statistics and, with `relu`, the result for backward. "triton" takes three launches forward and four backward,
    computes in float32 whatever the dtype of `x`, and keeps `x` and the statistics alone for backward; a class that the
    tables do not have gives NaN there. "eager" is plain PyTorch; "auto" is "triton" on CUDA, "cpu" on the CPU and
    "eager" elsewhere. Under `torch.func`, forward-mode AD, torch.compile (which fuses it itself) and torch.export every
    backend computes in plain PyTorch. Differentiable twice and more.

    Raises ValueError for shapes that do not fit, missing statistics, and a single value a channel in training, and
    RuntimeError if "triton" is asked for where it cannot run.
    """
    _check(x, gain, bias, y, running_mean, running_var, training)
    chosen = choose_batch_norm(_OP, backend, x).backend
    options = Options(training, momentum, eps, relu, one_plus, backend=chosen)
    if chosen != "eager" and not is_plain():
        return fused_batch_norm(x, gain, bias, y, running_mean, running_var, options)
    return plain(x, gain, bias, y, running_mean, running_var, options)


class Options(NamedTuple):
    """The settings of `conditional_batch_norm`; with `sync` the statistics are those of all processes' batches.

    `backend` is "triton" or "cpu". With `remakes` "cpu" does not keep its result for the ReLU's mask, and backward
    computes it again. That frees memory if the op that takes the result does not keep it either: `conv2d` given
    `ops.remade.remade(result)`.
    """

    training: bool
    momentum: float = 0.1
    eps: float = 1e-5
    relu: bool = False
    one_plus: bool = False
    sync: Sync | None = None
    backend: str = "triton"
    remakes: bool = False


def fused_batch_norm(
    x: Tensor, gain: Tensor | None, bias: Tensor | None, y: Tensor | None, running_mean: Tensor | None,
    running_var: Tensor | None, options: Options,
) -> Tensor:  # fmt: skip
    """Run a fused backend, without checks. With `options.sync` the statistics are those of all processes' batches.

    Then the result is differentiable once, and processes may have any number of images, also none.
    """
    gain, bias, y = (None if t is None else t.contiguous() for t in (gain, bias, y))
    out: Tensor = BatchNormFunction.apply(
        x if is_dense(x) else x.contiguous(), gain, bias, y, running_mean, running_var, options
    )
    return out


def plain(
    x: Tensor, gain: Tensor | None, bias: Tensor | None, y: Tensor | None, running_mean: Tensor | None,
    running_var: Tensor | None, options: Options,
) -> Tensor:  # fmt: skip
    """Return the same in plain PyTorch."""
    training, momentum, eps, relu, one_plus, *_ = options
    if one_plus and gain is not None:
        gain = 1 + gain
    table = gain if gain is not None else bias
    if table is None or table.ndim == 1:
        out = F.batch_norm(x, running_mean, running_var, gain, bias, training, momentum, eps)
    else:
        out = F.batch_norm(x, running_mean, running_var, None, None, training, momentum, eps)
        if gain is not None:
            out = _by_image(gain, y, x.dtype) * out
        if bias is not None:
            out = out + _by_image(bias, y, x.dtype)
    return F.relu(out) if relu else out


def _by_image(table: Tensor, y: Tensor | None, dtype: torch.dtype) -> Tensor:
    rows = table if y is None else F.embedding(y, table)
    return rows.to(dtype)[:, :, None, None]


class BatchNormFunction(torch.autograd.Function):
    """A fused backend both ways; where a graph of the backward is asked for, that of plain PyTorch."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gain: Tensor | None, bias: Tensor | None, y: Tensor | None, running_mean: Tensor | None,
        running_var: Tensor | None, options: Options,
    ) -> Tensor:  # fmt: skip
        mean, var, count = _statistics(x, running_mean, running_var, options)
        ctx.options, ctx.result = options, None
        out = output(x, mean, var, gain, bias, y, options)
        kept = out if options.backend == "cpu" and options.relu and not options.remakes else None
        ctx.save_for_backward(x, gain, bias, y, mean, var, count, kept)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (d_out,), (x, gain, bias, y, mean, var, count, out), options = grads, ctx.saved_tensors, ctx.options
        wanted = ctx.needs_input_grad[:3]
        result, ctx.result = ctx.result, None
        if torch.is_grad_enabled() or is_old_batch(d_out) or is_transformed():
            if options.sync is not None:
                raise RuntimeError(
                    f"{_OP}: batch norm over several processes must be differentiated once, got create_graph=True or "
                    "batched gradients"
                )
            with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
                # views: one input may be made of another, and its gradient is not that one's
                views: list[Any] = [
                    None if t is None else t.view_as(t) if t.requires_grad else t.detach() for t in (x, gain, bias)
                ]
                again = plain(views[0], views[1], views[2], y, *fixed_statistics(mean, var, options), options)
            return (*gradients(again, views, d_out, wanted), None, None, None, None)
        if options.backend == "cpu":
            if options.relu and out is None:
                out = output(x, mean, var, gain, bias, y, options) if result is None else result
            found = _gradients_on_cpu(d_out, x, gain, bias, y, mean, var, count, out, options, wanted)
        else:
            found = _gradients(d_out, x, gain, bias, y, mean, var, count, options, wanted)
        return (*found, None, None, None, None)


def fixed_statistics(mean: Tensor, var: Tensor, options: Options) -> tuple[Tensor | None, Tensor | None]:
    """Return the statistics that `plain` is given: none where it computes those of the batch."""
    return (None, None) if options.training else (mean, var)


def output(
    x: Tensor, mean: Tensor, var: Tensor, gain: Tensor | None, bias: Tensor | None, y: Tensor | None, options: Options
) -> Tensor:
    """Return the result of a fused backend for these statistics."""
    if not x.numel():
        return torch.empty_like(x)
    if options.backend == "cpu":
        form = options.eps, options.relu, options.one_plus
        return torch.ops.sagan_fast.batch_norm_cpu.default(x, mean, var, gain, bias, y, *form)  # type: ignore[no-any-return]
    from sagan_fast.kernels.batch_norm.forward import batch_norm_fwd

    return batch_norm_fwd(x, mean, var, gain, bias, y, eps=options.eps, relu=options.relu, one_plus=options.one_plus)


def _statistics(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, options: Options
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the mean and biased variance to normalise with, and, with `sync`, the positions of all processes."""
    from sagan_fast.kernels.launch import accumulator_dtype

    if options.backend == "cpu":
        from sagan_fast.kernels.batch_norm.cpu import batch_norm_moments
    else:
        from sagan_fast.kernels.batch_norm.forward import batch_norm_moments

    acc, C = accumulator_dtype(x.dtype), x.shape[1]
    if not options.training:
        assert running_mean is not None and running_var is not None  # as it was checked
        # copies on the CPU, where running averages move without a new version (findings/batch_norm_version.sh)
        own = options.backend == "cpu"
        return running_mean.to(acc, copy=own), running_var.to(acc, copy=own), None
    if options.sync is None:
        if not x.numel():
            return x.new_zeros(C, dtype=acc), x.new_ones(C, dtype=acc), None
        mean, var = batch_norm_moments(x, running_mean, running_var, options.momentum)
        for moved in (running_mean, running_var) if options.backend == "triton" else ():
            if moved is not None and not moved.is_inference():
                torch.autograd.graph.increment_version(moved)  # written by a kernel, of which autograd knows nothing
        return mean, var, None
    mean, var = batch_norm_moments(x) if x.numel() else (x.new_zeros(C, dtype=acc), x.new_zeros(C, dtype=acc))
    mine = torch.cat([mean, var, x.new_full((1,), x.numel() // max(C, 1), dtype=acc)])
    mean, var, count = together(options.sync.gather(mine), C)
    if running_mean is not None and running_var is not None:
        share = options.momentum * (count > 0)
        unbiased = var * (count / (count - 1).clamp_min(1))
        for moved, value in ((running_mean, mean), (running_var, unbiased)):
            moved.lerp_(value.to(moved.dtype), share.to(moved.dtype))
    return mean, var, count


def together(gathered: Tensor, C: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean, biased variance and count of all from `gathered` (processes, 2C + 1), the same of each process.

    The moments are about each process' own mean (Chan, Golub & LeVeque 1983): no difference of large sums.
    """
    means, variances, counts = torch.split(gathered, [C, C, 1], dim=1)
    count = counts.sum()
    share = counts / count.clamp_min(1)
    mean = (share * means).sum(0)
    return mean, (share * (variances + (means - mean).square())).sum(0), count


def _gradients(
    d_out: Tensor, x: Tensor, gain: Tensor | None, bias: Tensor | None, y: Tensor | None, mean: Tensor, var: Tensor,
    count: Tensor | None, options: Options, wanted: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    from sagan_fast.kernels.batch_norm import backward as kernels
    from sagan_fast.kernels.tiles import is_channels_last

    d_out = d_out.contiguous(memory_format=torch.channels_last if is_channels_last(x) else torch.contiguous_format)
    form: dict[str, Any] = dict(eps=options.eps, relu=options.relu, one_plus=options.one_plus)
    want_x, want_gain, want_bias = wanted
    empty, totals, d_gain, d_bias = not x.numel(), None, None, None
    if options.training and want_x or want_gain or want_bias:
        sums = None if empty else kernels.batch_norm_bwd_sums(d_out, x, mean, var, gain, bias, y, **form)
        if want_gain or want_bias:
            tables = gain if want_gain else None, bias if want_bias else None
            if sums is None:
                d_gain, d_bias = (None if table is None else torch.zeros_like(table) for table in tables)
            else:
                d_gain, d_bias = kernels.batch_norm_bwd_tables(sums, x, *tables, y)
        if options.training and want_x:
            if sums is None:
                totals = mean.new_zeros((2, len(mean)))
            else:
                factor = len(mean) / x.numel() if count is None else 1.0
                totals = kernels.batch_norm_bwd_totals(sums, x, gain, y, factor=factor, one_plus=options.one_plus)
            if options.sync is not None and count is not None:
                options.sync.add(totals)
                totals.div_(count.clamp_min(1))
    d_x = None
    if want_x:
        d_x = torch.empty_like(x)
        if not empty:
            d_x = kernels.batch_norm_bwd_input(d_out, x, mean, var, gain, bias, y, totals, **form)
    return d_x, d_gain, d_bias


def _gradients_on_cpu(
    d_out: Tensor, x: Tensor, gain: Tensor | None, bias: Tensor | None, y: Tensor | None, mean: Tensor, var: Tensor,
    count: Tensor | None, out: Tensor | None, options: Options, wanted: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    given = (d_out, x, out, mean, var, gain, bias, y)
    if options.sync is None and x.numel():
        form = options.eps, options.one_plus, options.training, list(wanted)
        found = torch.ops.sagan_fast.batch_norm_cpu_backward.default(*given, *form)
        return tuple(grad if want else None for grad, want in zip(found, wanted, strict=True))

    def means_of(totals: Tensor) -> Tensor:
        if options.sync is None or count is None:
            return totals
        options.sync.add(totals)
        return totals.div_(count.clamp_min(1))

    means = means_of if options.training else None
    return cpu.batch_norm_bwd(*given, eps=options.eps, one_plus=options.one_plus, wanted=wanted, means_of=means)


_TABLES = "Tensor mean, Tensor var, Tensor? gain, Tensor? bias, Tensor? y"
define(f"batch_norm_cpu(Tensor x, {_TABLES}, float eps, bool relu, bool one_plus) -> Tensor")
define(
    f"batch_norm_cpu_backward(Tensor d_out, Tensor x, Tensor? out, {_TABLES}, float eps, bool one_plus, bool training,"
    " bool[] wanted) -> (Tensor, Tensor, Tensor)"
)


@torch.library.impl(LIBRARY, "batch_norm_cpu", "CPU")
def _forward_on_cpu(
    x: Tensor, mean: Tensor, var: Tensor, gain: Tensor | None, bias: Tensor | None, y: Tensor | None, eps: float,
    relu: bool, one_plus: bool,
) -> Tensor:  # fmt: skip
    return cpu.batch_norm_fwd(x, mean, var, gain, bias, y, eps=eps, relu=relu, one_plus=one_plus)


@torch.library.impl(LIBRARY, "batch_norm_cpu_backward", "CPU")
def _backward_on_cpu(*args: Any) -> tuple[Tensor, ...]:
    *given, eps, one_plus, training, wanted = args
    x = given[1]
    means = (lambda totals: totals * (x.shape[1] / x.numel())) if training else None
    found = cpu.batch_norm_bwd(*given, eps=eps, one_plus=one_plus, wanted=wanted, means_of=means)
    return tuple(x.new_empty(0) if grad is None else grad for grad in found)


def _check(
    x: Tensor, gain: Tensor | None, bias: Tensor | None, y: Tensor | None, running_mean: Tensor | None,
    running_var: Tensor | None, training: bool,
) -> None:  # fmt: skip
    check_ndim(_OP, "x", x, "B, C, H, W")
    B, C = x.shape[:2]
    check_same_device(
        _OP, "x", x, gain=gain, bias=bias, y=y, running_mean=running_mean, running_var=running_var
    )  # fmt: skip
    for name, statistic in (("running_mean", running_mean), ("running_var", running_var)):
        if statistic is not None:
            check_shape(_OP, name, statistic, (C,), "C")
        elif not training:
            raise ValueError(f"{_OP}: {name} must be given without training, got None")
    if (running_mean is None) != (running_var is None):
        raise ValueError(f"{_OP}: running_mean and running_var must be given both or neither, got one")
    if training and x.numel() == C:
        raise ValueError(f"{_OP}: x must have more than 1 value a channel in training, got shape {tuple(x.shape)}")
    if y is not None:
        if y.is_floating_point():
            raise TypeError(f"{_OP}: y must have an integer dtype, got {y.dtype}")
        check_shape(_OP, "y", y, (B,), "B")
    first = next((table for table in (gain, bias) if table is not None), None)
    for name, table in (("gain", gain), ("bias", bias)):
        if table is None or first is None:
            continue
        if y is None and table.ndim == 1 and first.ndim == 1:
            check_shape(_OP, name, table, (C,), "C")
        elif y is None:
            check_shape(_OP, name, table, (B, C), "B, C")
        else:
            check_ndim(_OP, name, table, "num_classes, C")
            check_shape(_OP, name, table, (first.shape[0], C), "num_classes, C")
