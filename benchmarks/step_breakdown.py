"""Where the time of one training step goes on the CPU, by group of operators, and what each group needs at least.

    python -m benchmarks.step_breakdown                  # one step of feat64 at 128x128, 32 base channels, batch 16

PyTorch's profiler times every operator. FLOP and bytes follow from the shapes that it records. "needed" counts each
product once, in the form with the fewest of them: resizing folded into its convolution, no score of the attention
computed again for backward. "done" counts what ran. The limit is the largest of needed FLOP, exponentials and bytes
over the rates that this machine reached in the same run (benchmarks/ceilings.py); elementwise groups need no bytes of
their own, since a fused convolution would do their work: all of their time is what fusions could win.
"""

import argparse
import math
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import ceilings
from benchmarks.bench_train_step import flops_by_operator
from benchmarks.machine import MACHINES
from benchmarks.records import Record, append
from benchmarks.step_options import OPTIONS, config_of, step_of
from benchmarks.text import table

FLOAT = 4
CONV = "sagan_fast::conv_windows"
GROUPS: dict[str, tuple[str, ...]] = {
    "convolutions": ("mkldnn_convolution", "_convolution", "convolution_backward", "slow_conv", CONV),
    "attention": (
        "sagan_fast::attention", "sagan_fast::attention_gradients", "bmm", "baddbmm_", "exp2_", "log2_", "_softmax",
        "max_pool2d", "slice_backward", "constant_pad_nd",
    ),
    "ReLU": ("clamp_min", "threshold_backward", "relu"),
    "batch norm, gains": ("native_batch_norm", "addcmul", "embedding", "sum"),
    "resizing": ("upsample", "avg_pool2d"),
    "additions, products": ("add", "mul", "sub", "div", "lerp", "tanh", "neg"),
    "copies": ("copy_", "cat", "fill_", "zero_", "clone", "index"),
    "spectral norm": ("sagan_fast::spectral_norm", "mv", "addmv", "addr", "dot"),
    "optimizer, averages": ("_fused_adam", "_foreach", "linalg_vector_norm"),
}  # fmt: skip
"""Beginnings of the names of operators, the longest that fits; all others are "other"."""
FUSABLE = ("ReLU", "batch norm, gains", "resizing", "additions, products", "copies")
OTHER = "other"


@dataclass
class Group:
    """What one group of operators did in a step."""

    calls: int = 0
    seconds: float = 0.0
    done: float = 0.0
    needed: float = 0.0
    exps: float = 0.0
    nbytes: float = 0.0


def group_of(name: str) -> str:
    """Return the group of the operator `name`, as the profiler writes it."""
    short = name.removeprefix("aten::")
    fits = ((len(begin), group) for group, begins in GROUPS.items() for begin in begins if short.startswith(begin))
    return max(fits, default=(0, OTHER))[1]


def flops_of(name: str, shapes: Sequence[Any], last: Any) -> float:
    """Return the FLOP of one call with inputs of these `shapes`; 0 where it has no products.

    `last` is the last argument: which gradients `convolution_backward` computes, or the stride of an op of ours.
    """
    short = name.removeprefix("aten::")
    if short == f"{CONV}_weight":
        grad, x = shapes[:2]
        return 2.0 * math.prod(grad) * x[1] * (int(last) + 2) ** 2  # 3x3 with stride 1, 4x4 with stride 2
    if short.startswith(CONV):
        x, weight = shapes[:2]
        return 2.0 * math.prod(x) / x[1] / (1 if "transpose" in short else int(last) ** 2) * math.prod(weight)
    if short == "convolution_backward":
        (grad, x, weight), wanted = shapes[:3], sum(bool(each) for each in list(last)[:2])
        # a 4x4 one has its 16 products at each pixel of the smaller map
        pixels = min(math.prod(grad) / grad[1], math.prod(x) / x[1])
        return 2.0 * wanted * pixels * math.prod(weight)
    if short in ("mkldnn_convolution", "_convolution"):
        x, weight = shapes[:2]
        pixels = math.prod(x) / x[1] / (4 if weight[2] == 4 and short == "mkldnn_convolution" else 1)
        return 2.0 * pixels * math.prod(weight)
    if short in ("bmm", "baddbmm_"):
        (B, N, K), (_, _, M) = shapes[:2] if short == "bmm" else shapes[1:3]
        return 2.0 * B * N * K * M
    return 2.0 * math.prod(shapes[1]) if short in ("mv", "addmv") and len(shapes[1]) == 2 else 0.0


def breakdown(batch: int, channels: int = 32, classes: int = 100) -> dict[str, Group]:
    """Return the groups of one step, after one that warms up."""
    options = argparse.Namespace(channels=channels, classes=classes)
    step = step_of(list(OPTIONS)[-1], options, batch)
    step()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as found:
        step()
    groups: dict[str, Group] = defaultdict(Group)
    for event in found.events():
        if not event.name.startswith(("aten::", "sagan_fast::")):
            continue
        parent = above = event.cpu_parent
        while parent is not None and not parent.name.startswith(("aten::", "sagan_fast::")):
            parent = parent.cpu_parent
        while above is not None and not above.name.startswith(CONV):
            above = above.cpu_parent
        group = groups[group_of(event.name if above is None else above.name)]
        group.seconds += event.self_cpu_time_total / 1e6
        is_view = event.name.endswith(VIEWS)
        group.calls += parent is None and not is_view
        if event.name == "aten::_convolution" and any("mkldnn" in child.name for child in event.cpu_children):
            continue  # counted there
        shapes = [shape for shape in event.input_shapes if all(isinstance(side, int) for side in shape)]
        last = (event.concrete_inputs or [(True, True)])[-1]
        group.done += flops_of(event.name, event.input_shapes, last)
        if event.self_cpu_time_total and not is_view and above is None:
            group.nbytes += FLOAT * sum(math.prod(shape) for shape in shapes if shape)
    config = config_of(options, batch)
    for operator, flops in flops_by_operator(config, "folded").items():
        groups["convolutions" if "conv" in operator else "attention" if "bmm" in operator else OTHER].needed += flops
    scores = (config.resolution // 2) ** 2 * (config.resolution // 4) ** 2
    groups["attention"].exps = 5.0 * batch * scores  # G twice, D on real images, and on generated ones twice
    return dict(groups)


VIEWS = (  # and what gives a view or an alias most of the time
    "view",
    "as_strided",
    "slice",
    "transpose",
    "permute",
    "expand",
    "detach",
    "reshape",
    "select",
    "::t",
    "empty",
    "::to",
    "alias",
    "narrow",
    "squeeze",
    "chunk",
    "split",
    "empty_strided",
    "lift_fresh",
)


def records(batch: int, channels: int) -> list[Record]:
    """Return one record for each group, the slowest first."""
    made = []
    rate, copies = ceilings.product_flops("fp32", "cpu"), ceilings.copy_bytes_per_s("cpu")
    exps = ceilings.exps_per_s("cpu")
    groups = breakdown(batch, channels)
    total = sum(group.seconds for group in groups.values())
    for name, group in sorted(groups.items(), key=lambda item: -item[1].seconds):
        needed_bytes = 0.0 if name in FUSABLE else group.nbytes
        limits = {"flop": group.needed / rate, "exp": group.exps / exps, "bytes": needed_bytes / copies}
        limit, by = max((seconds, kind) for kind, seconds in limits.items())
        chip = MACHINES[90].limit_us(group.needed, group.exps, needed_bytes / 2, "bf16")[0]
        made.append(Record(
            "step_breakdown", f"feat64-128-ch{channels}-batch{batch}", "fp32", "forward+backward", name, "profiler",
            p50_us=group.seconds * 1e6, samples=1, bound_us=limit * 1e6, bound_by=by,
            config={**asdict(group), "share": group.seconds / total, "h200_bf16_us": chip},
        ))  # fmt: skip
    return made


COLUMNS = (
    "operators | calls | GFLOP needed | GFLOP done | GB moved | ms | share | limit here, ms | set by | to win, ms | "
    "of the step | limit on an H200, bf16, us"
)


def breakdown_table(found: Sequence[dict[str, Any]], markdown: bool = True) -> str:
    """Return the records of one step, as `records.read` gives them, as a table; the last row is their sum."""
    rows, total = [], sum(r["p50_us"] for r in found)
    for r in found:
        c, win = r["config"], max(0.0, r["p50_us"] - r["bound_us"])
        by = "fusion" if r["provider"] in FUSABLE else r["bound_by"]
        rows.append([
            r["provider"], c["calls"], c["needed"] / 1e9, c["done"] / 1e9, c["nbytes"] / 1e9, r["p50_us"] / 1e3,
            f"{c['share']:.1%}", r["bound_us"] / 1e3, by, win / 1e3, f"{win / total:.1%}", c["h200_bf16_us"],
        ])  # fmt: skip
    sums: list[Any] = [sum(row[i] for row in rows) if i in (1, 2, 3, 4, 5, 7, 9, 11) else "" for i in range(12)]
    sums[0], sums[6], sums[10] = "all", "100.0%", f"{sums[9] * 1e3 / total:.1%}"
    return table(COLUMNS, [*rows, sums], markdown)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; append its records with --out."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step_breakdown", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    for key, value in (("batch", 16), ("channels", 32), ("threads", 1)):
        parser.add_argument(f"--{key}", type=int, default=value)
    parser.add_argument("--out", type=Path, help="folder to append records to, such as benchmarks/results")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    found = records(options.batch, options.channels)
    print(breakdown_table([asdict(record) for record in found], markdown=False))
    for record in found if options.out else ():
        append(record, "cpu", options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
