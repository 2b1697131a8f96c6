"""Finds launch configs that fit a chip by compiling for it: python -m benchmarks.fit --arch 86 [--dtype fp32]

A config fits if it spills nothing and stays below the shared memory, on even and ragged maps, pooled or not, in both
memory formats. The shipped config of a row stays if it fits and leaves room for two programs a multiprocessor. Else the
one with the fewest warp instructions a score is written, "from the machine code"; room for one alone counts a quarter
more. Candidates are those of `benchmarks.tune`, which measures on a GPU.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "0"  # before any kernel is imported

from benchmarks.compile import compile_plan, resources
from benchmarks.machine import MACHINES, SHARED_BYTES
from benchmarks.shapes import BlockShape
from benchmarks.shipped import width_plans
from benchmarks.tune import KERNELS, Key, candidates, rows, write
from sagan_fast.kernels import configs
from sagan_fast.kernels.configs import Arch, LaunchConfig
from sagan_fast.kernels.launch import Plan


@contextmanager
def shipped(key: Key, config: LaunchConfig) -> Iterator[None]:
    """Let `config` be the config of the row `key`."""
    table, before = configs._configs(), configs._configs().get(key)
    table[key] = config
    configs.lookup.cache_clear()
    try:
        yield
    finally:
        if before is None:
            del table[key]
        else:
            table[key] = before
        configs.lookup.cache_clear()


def plans_of(key: Key, arch: Arch) -> list[Plan]:
    """Return launches on `arch` that run the row: on even and ragged maps, pooled or not, in both memory formats."""
    kernel, _, precision, width, size = key
    D_QK, D_V = (int(number) for number in width.split("x"))
    found = width_plans(D_QK, D_V, 16 if size == "small" else 64, precision, arch)
    return [plan for plan in found if plan.name in (kernel, f"self_{kernel}")]


def cost(key: Key, config: LaunchConfig) -> tuple[float, bool] | None:
    """Return warp instructions a score, and whether there is room for two; None where `config` does not fit."""
    arches: Sequence[Arch] = (int(key[1]),) if key[1].isdecimal() else ("gfx90a", "gfx1100")
    channels = config.BLOCK_C if key[0] in ("projection_fwd", "attention_bwd_preprocess") else 1
    area = prod(size for size in (config.BLOCK_N, config.BLOCK_M, channels) if size)
    worst, room = 0.0, True
    with shipped(key, config):
        for arch, plan in ((chip, plan) for chip in arches for plan in plans_of(key, chip)):
            try:
                uses = resources(compile_plan(plan, arch))
            except Exception as error:  # a tile that the compiler refuses is no candidate
                print(f"    {config}: {type(error).__name__} {str(error)[:80]}", flush=True)
                return None
            if uses["stack"] or uses["spills"] or uses["smem"] > SHARED_BYTES[arch]:
                return None
            worst = max(worst, uses["instructions"] * config.num_warps / area)
            if machine := MACHINES.get(arch):
                numbers = uses["registers"], config.num_warps, uses["smem"], uses["tmem"]
                room = room and machine.resident_blocks(*numbers)[0] >= 2
    return worst * (1.0 if room else 1.25), room


def fit(key: Key, given: LaunchConfig) -> tuple[LaunchConfig, float | None]:
    """Return the config for the row and its cost; `given` where it fits, None as cost where nothing does."""
    price = cost(key, given)
    if price is not None and price[1]:
        return given, price[0]
    found = [] if price is None else [(price[0], 0, given)]
    for number, config in enumerate(candidates(key, given), 1):
        price = cost(key, config)
        print(f"    {config}: {price and round(price[0], 3)}", flush=True)
        if price is not None:
            found.append((price[0], number, config))
        if len(found) == 4:  # enough to compare
            break
    return (min(found)[2], min(found)[0]) if found else (given, None)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 1 if a row has no config that fits."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fit", description=__doc__.split("\n\n")[0])
    parser.add_argument("--arch", required=True, help="compute capability times ten, or gfx for AMD")
    parser.add_argument("--dtype", choices=("bf16", "tf32", "fp32"), default="bf16", help="precision (default bf16)")
    parser.add_argument("--kernel", action="append", choices=KERNELS, help="only this kernel; may be repeated")
    widths = {f"{D_QK}x{D_V}": (D_QK, D_V) for D_QK, D_V in configs.WIDTHS}
    parser.add_argument("--width", action="append", choices=widths, help="only this width; may be repeated")
    options = parser.parse_args(arguments)
    arch: Arch = int(options.arch) if options.arch.isdecimal() else options.arch
    shapes = [
        BlockShape(name, 2, 2 * widths[name][1], side, side, *widths[name], pool=False)
        for name in options.width or widths for side in (16, 64)
    ]  # fmt: skip
    missing = 0
    for row in rows(arch, options.dtype, options.kernel or KERNELS, shapes):
        config, price = fit(row.key, row.shipped)
        print(f"{' '.join(row.key)}: {config} ({price and round(price, 3)})", flush=True)
        missing += price is None
        if price is not None and config != row.shipped:
            write(configs.FILE, row.key, config, "from the machine code")
            configs._configs()[row.key] = config
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
