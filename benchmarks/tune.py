"""Writes the fastest launch configs of the attention block to kernels/configs.csv, measured on this GPU.

    python -m benchmarks.tune [--dtype bf16] [--shape feat64-G-64x64-C128] [--kernel attention_fwd] [--dry-run]

Shapes that share a row (widths, small or large maps) are measured together. Candidates are the shipped config with one
field changed or two; each one's results are first held against the shipped config's, then it is timed on every shape.
The one with the least geometric mean of times over the shipped ones is written if it saves 2 % or more, with where and
when it was measured. Rows are written as they are found: a run that is cut off still counts, and the next
one goes on from them. `--dry-run` lists the candidates and needs no GPU.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from datetime import date
from itertools import combinations, product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import bench_attention
from benchmarks.accuracy import RMS_TOLERANCE, rel_rms
from benchmarks.machine import MACHINES
from benchmarks.shapes import BLOCK_SHAPES, BlockShape
from sagan_fast.kernels import configs
from sagan_fast.kernels.configs import INTERPRETED_ARCH, Arch, LaunchConfig
from sagan_fast.kernels.launch import device_arch
from sagan_fast.kernels.projection.forward import projection_fwd
from sagan_fast.kernels.self_attention.backward import self_attention_bwd
from sagan_fast.kernels.self_attention.forward import block_fwd, self_attention_fwd
from sagan_fast.kernels.self_attention.inputs import BlockInputs

KERNELS = ("projection_fwd", "attention_fwd", "attention_bwd_preprocess", "attention_bwd_dkv", "attention_bwd_dq")
LEAST_GAIN = 0.02
"""A config must save this share of the time to replace another: less is noise."""


Key = tuple[str, ...]


class Row(NamedTuple):
    """A row of configs.csv to be found: (kernel, architecture, precision, width, size), and the shapes that run it."""

    key: Key
    shipped: LaunchConfig
    shapes: tuple[BlockShape, ...]

    @property
    def kernel(self) -> str:
        return self.key[0]


def rows(arch: Arch, precision: str, kernels: Sequence[str], shapes: Sequence[BlockShape]) -> list[Row]:
    """Return the rows that `shapes` use on `arch`, with the config that each is launched with now."""
    found: dict[Key, Row] = {}
    for kernel in kernels:
        for shape in shapes:
            d_qk = 1 if kernel == "attention_bwd_preprocess" else shape.d_qk
            owned = {"attention_fwd": shape.N, "attention_bwd_dkv": shape.M, "attention_bwd_dq": shape.N}
            positions = owned.get(kernel)
            width, size = configs.row_width(kernel, d_qk, shape.d_v), configs.row_size(positions)
            key = (kernel, str(arch), configs.row_precision(precision), width, size)
            shipped = configs.lookup(kernel, arch, precision, d_qk, shape.d_v, positions)
            found[key] = Row(key, shipped, (*(found[key].shapes if key in found else ()), shape))
    return list(found.values())


def candidates(key: Key, shipped: LaunchConfig) -> Iterator[LaunchConfig]:
    """Yield `shipped` with one field changed, then with two; what does not fit a GPU is refused by its compiler."""
    steps: dict[str, list[Any]] = {}
    for field in fields(shipped):
        value = getattr(shipped, field.name)
        if field.name.startswith("BLOCK_"):
            largest = 128 if field.name == "BLOCK_C" else 256
            steps[field.name] = [size for size in (value // 2, value * 2) if value and 16 <= size <= largest]
        elif field.name == "num_warps":
            steps[field.name] = [12 - value]  # 4 or 8
        elif field.name == "num_stages":
            steps[field.name] = [stages for stages in (1, 2, 3) if stages != value]
        elif field.name == "maxnreg":
            steps[field.name] = [cap for cap in (None, 128, 168, 255) if cap != value]
        elif field.name == "sum_by_product":
            wide = key[0] == "attention_fwd" and int(key[3].split("x")[1]) > 64
            steps[field.name] = [] if key[0] != "attention_fwd" or (wide and not value) else [not value]
        elif field.name == "tf32x3":
            steps[field.name] = [not value] if tensor_cores_pay(key) else []
    seen = {shipped}
    for changes in (1, 2):
        for names in combinations(steps, changes):
            for values in product(*(steps[name] for name in names)):
                candidate = replace(shipped, **dict(zip(names, values, strict=True)))
                if candidate not in seen:
                    seen.add(candidate)
                    yield candidate


def tensor_cores_pay(key: Key) -> bool:
    """Return whether three TF32 products are faster than one in float32 on the row's chip."""
    machine = MACHINES.get(int(key[1])) if key[1].isdecimal() else None
    return key[2] == "fp32" and machine is not None and machine.tensor["tf32"] > 3 * machine.flop_rate("fp32")


def runner(kernel: str, shape: BlockShape, dtype: str) -> Callable[[LaunchConfig | None], tuple[Tensor | None, ...]]:
    """Return a function of a config (None for the shipped one) that runs `kernel` on random tensors of `shape`."""
    d_y, x, *weights, gamma = (t if t is None else t.detach() for t in bench_attention.inputs(shape, dtype, "cuda", 0))
    w_theta, w_phi, w_g, w_o = (t if t is None else t.flatten(1) for t in weights)
    inputs = BlockInputs(x, w_theta, w_phi, w_g, w_o, gamma)
    _, saved = self_attention_fwd(inputs, pool=shape.pool)
    assert saved is not None

    def run(config: LaunchConfig | None) -> tuple[Tensor | None, ...]:
        if kernel == "projection_fwd":
            return projection_fwd(x, w_theta, w_phi, w_g, pool=shape.pool, config=config)
        if kernel == "attention_fwd":
            return block_fwd(x, saved.q, saved.k, saved.v, w_o, gamma, config=config)
        # the other kernels of the backward keep their configs, so that differences are this one's
        option = kernel.removeprefix("attention_bwd_") + "_config"
        return self_attention_bwd(d_y, inputs, saved, need_weights=False, need_biases=False, **{option: config})

    return run


def agrees(found: tuple[Tensor | None, ...], shipped: tuple[Tensor | None, ...], dtype: str) -> bool:
    """Whether all floating tensors are as near to the shipped config's as the precision lets them be."""
    return all(
        rel_rms(a, b) <= 2 * RMS_TOLERANCE[dtype]
        for a, b in zip(found, shipped, strict=True)
        if a is not None and b is not None and a.is_floating_point()
    )


def tune(
    row: Row, dtype: str, deadline: float, make: Callable[..., Any] = runner, timed: Callable[..., float] | None = None
) -> tuple[Any, float, int]:
    """Return the best config for `row`, its time over the shipped one's, and how many candidates were measured.

    No further candidate is begun after `deadline`, a reading of `time.monotonic`. `timed` returns the time of a call.
    """
    if timed is None:
        from triton.testing import do_bench

        timed = lambda call: do_bench(call, return_mode="median")  # noqa: E731
    runs = [make(row.kernel, shape, dtype) for shape in row.shapes]
    shipped = [run(None) for run in runs]
    best, least, measured = row.shipped, 1.0 - LEAST_GAIN, 0
    for config in candidates(row.key, row.shipped):
        if time.monotonic() > deadline:
            break
        measured += 1
        logarithm = 0.0
        try:
            for run, truth in zip(runs, shipped, strict=True):
                if not agrees(run(config), truth, dtype):
                    raise ArithmeticError("its results are WRONG")
                # beside each other, so that a clock that changes changes both
                before = timed(lambda run=run: run(None))
                logarithm += math.log(timed(lambda run=run, config=config: run(config)) / before)
        except Exception as error:  # too large for registers or shared memory, or a shape the compiler refuses
            print(f"  {config}: {type(error).__name__} {str(error)[:80]}", file=sys.stderr)
            continue
        ratio = math.exp(logarithm / len(runs))
        if ratio < least:
            best, least = config, ratio
    return best, least if best != row.shipped else 1.0, measured


def write(path: Path, key: Key, config: LaunchConfig, origin: str) -> None:
    """Let the launch `key` have `config` in the file of configs, and say where it comes from; whole or not at all."""
    old = configs.read_rows(path)
    kept = [part for one in old for part in (one.without(key) if key in one.keys else [one])]
    kept.append(configs.Row(key[0], tuple((cell,) for cell in key[1:]), config, origin))
    new = path.with_suffix(".new")
    new.write_text(configs.format_rows(configs.merged(kept)))
    new.replace(path)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status, 2 where there is no GPU to measure on."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__.split("\n\n")[0])
    add, names = parser.add_argument, [shape.name for shape in BLOCK_SHAPES]
    add("--dtype", choices=sorted(RMS_TOLERANCE), default="bf16", help="precision (default bf16)")
    add("--shape", action="append", choices=names, help="only this shape; may be repeated")
    add("--kernel", action="append", choices=KERNELS, help="only this kernel; may be repeated")
    add("--minutes", type=float, default=8.0, help="start no candidate after this time (default 8)")
    add("--out", type=Path, default=configs.FILE, help="file of the launch configs (default kernels/configs.csv)")
    add("--dry-run", action="store_true", help="list the candidate configs; needs no GPU")
    options = parser.parse_args(arguments)
    if not options.dry_run and not torch.cuda.is_available():
        print("benchmarks.tune: needs a CUDA device (or --dry-run)", file=sys.stderr)
        return 2
    arch = INTERPRETED_ARCH if options.dry_run else device_arch(torch.cuda.current_device())
    shapes = [shape for shape in BLOCK_SHAPES if options.shape is None or shape.name in options.shape]
    found = rows(arch, options.dtype, options.kernel or KERNELS, shapes)
    if options.dry_run:
        for row in found:
            for config in candidates(row.key, row.shipped):
                print(*row.key, config)
        return 0
    import triton

    torch.set_float32_matmul_precision("high" if options.dtype == "tf32" else "highest")
    where = f"measured on {torch.cuda.get_device_name()}, {date.today().isoformat()}, triton {triton.__version__}"
    print(where)
    end = time.monotonic() + 60 * options.minutes
    for index, row in enumerate(found):
        share = (end - time.monotonic()) / (len(found) - index)
        config, ratio, measured = tune(row, options.dtype, time.monotonic() + share)
        if config != row.shipped:
            write(options.out, row.key, config, f"{where}: {ratio:.3f} of {row.shipped}")
        print(f"{' '.join(row.key)}: {config}, {ratio:.3f} of {row.shipped}; {measured} measured", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
