"""Find tiles that fit a chip, without one: python -m benchmarks.fit --arch 86 [--precision bf16]

For each row of kernels/configs.csv every candidate is compiled. A candidate fits if it spills nothing and stays below
the shared memory, on even and ragged maps, pooled or not, channels_last or not. Of those that fit, the one with the
fewest warp instructions a score is written, "from the machine code". One that leaves a multiprocessor room for a single
program counts a quarter more. A row that fits, with room for two, stays. `benchmarks.tune` measures on a GPU.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from math import prod

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "0"  # before any kernel is imported

from benchmarks.compile import compile_plan, resources
from benchmarks.machine import MACHINES
from benchmarks.shipped import block_plans
from benchmarks.tune import KERNELS, write
from sagan_fast.kernels import configs
from sagan_fast.kernels.configs import Arch, LaunchConfig
from sagan_fast.kernels.launch import Plan

OWNED = {
    "projection_fwd": ("BLOCK_M",),
    "attention_fwd": ("BLOCK_N", "BLOCK_M"),
    "attention_bwd_preprocess": ("BLOCK_N",),
    "attention_bwd_dkv": ("BLOCK_M", "BLOCK_N"),
    "attention_bwd_dq": ("BLOCK_N", "BLOCK_M"),
}
"""The tile sizes of a kernel, the one that a program owns first."""

CHUNKED = {name: ("BLOCK_C",) if name in ("projection_fwd", "attention_bwd_preprocess") else () for name in OWNED}
"""What else a kernel's products are cut by: the channels, where these are its only products."""

LDS_BYTES = 65536
"""Local data share of a program on AMD's CDNA and RDNA chips [AMD's ISA documents]."""

Key = tuple[str, ...]


def candidates(key: Key) -> Iterator[LaunchConfig]:
    """Yield the configs to try for a row, large tiles first."""
    kernel, _, precision, _, size = key
    owned = (128, 64, 32, 16) if size != "small" else (64, 32, 16)
    chunk = 64 if precision == "bf16" else 32
    chunks = (chunk, chunk // 2) if kernel in ("projection_fwd", "attention_fwd", "attention_bwd_preprocess") else (0,)
    inners = (128, 64, 32, 16) if len(OWNED[kernel]) == 2 else (16,)
    exact = (True, False) if tensor_cores_pay(key) else (False,)
    for tf32x3, stages, BLOCK_C, owner, inner, warps in product(exact, (2, 1), chunks, owned, inners, (4, 8)):
        if inner <= owner and not (owner == 128 and warps == 4 and precision == "fp32"):
            sizes = dict(zip(OWNED[kernel], (owner, inner), strict=False))
            yield LaunchConfig(**sizes, BLOCK_C=BLOCK_C, num_warps=warps, num_stages=stages, tf32x3=tf32x3)


def tensor_cores_pay(key: Key) -> bool:
    """Return whether three TF32 products are faster than one in float32 on the row's chip."""
    machine = MACHINES.get(int(key[1])) if key[1].isdecimal() else None
    return key[2] == "fp32" and machine is not None and machine.tensor["tf32"] > 3 * machine.flop_rate("fp32")


@contextmanager
def shipped(key: Key, config: LaunchConfig) -> Iterator[None]:
    """Let `config` be the config of the row `key`."""
    rows = configs._configs()
    before = rows.get(key)
    rows[key] = config
    configs.lookup.cache_clear()
    try:
        yield
    finally:
        if before is None:
            del rows[key]
        else:
            rows[key] = before
        configs.lookup.cache_clear()


def plans_of(key: Key) -> list[Plan]:
    """Return launches that run the row: on even and ragged maps, pooled or not, in both memory formats."""
    kernel, name, precision, width, size = key
    arch: Arch = int(name) if name.isdecimal() else next(chip for chip in configs.AMD)
    D_QK, D_V = (int(number) for number in width.split("x"))
    side = 16 if size == "small" else 64
    found = []
    for pool, ragged, channels_last in ((True, 0, True), (True, 1, False), (False, 1, True)):
        found += block_plans(
            2, max(32, 2 * D_V) if pool else D_V, side - ragged, side, D_QK, D_V, pool=pool, out_proj=pool,
            bias=bool(ragged), dtype=precision, arch=arch, channels_last=channels_last,
        )  # fmt: skip
    same = {
        "attention_fwd": ("self_attention_fwd",),
        "attention_bwd_preprocess": ("self_attention_bwd_preprocess",),
        "attention_bwd_dkv": ("self_attention_bwd_dkv", "attention_bwd_dkv"),
    }
    return [plan for plan in found if plan.name in same.get(kernel, (kernel,))]


def cost(key: Key, config: LaunchConfig) -> tuple[float, bool] | None:
    """Return warp instructions a score, and whether there is room for two; None where `config` does not fit."""
    name = key[1]
    arches: list[Arch] = [int(name)] if name.isdecimal() else ["gfx90a", "gfx1100"]
    most = MACHINES[int(name)].smem_block if name.isdecimal() else LDS_BYTES
    worst, room = 0.0, True
    with shipped(key, config):
        for plan in plans_of(key):
            for arch in arches:
                try:
                    uses = resources(compile_plan(plan, arch))
                except Exception as error:  # a tile that the compiler refuses is no candidate
                    print(f"    {config}: {type(error).__name__} {str(error)[:80]}", flush=True)
                    return None
                if uses["stack"] or uses["spills"] or uses["smem"] > most:
                    return None
                area = prod(getattr(config, size) or 1 for size in {*OWNED[key[0]], *CHUNKED[key[0]]})
                if isinstance(arch, int):
                    numbers = uses["registers"], config.num_warps, uses["smem"], uses["tmem"]
                    room = room and MACHINES[arch].resident_blocks(*numbers)[0] >= 2
                worst = max(worst, uses["instructions"] * config.num_warps / area)
    return worst * (1.0 if room else 1.25), room


def fit(key: Key, given: LaunchConfig) -> tuple[LaunchConfig, float | None]:
    """Return the config for the row and its cost; `given` where it fits, None as cost where nothing does."""
    found: list[tuple[float, int, LaunchConfig]] = []
    if not tensor_cores_pay(key):
        price = cost(key, given)
        if price is not None and price[1]:
            return given, price[0]
        if price is not None:
            found.append((price[0], -1, given))
    for number, config in enumerate(candidates(key)):
        if found and config.tf32x3 != found[0][2].tf32x3:
            break  # three TF32 products are taken wherever they fit
        price = cost(key, config)
        print(f"    {config}: {price and round(price[0], 3)}", flush=True)
        if price is not None:
            found.append((price[0], number, config))
        if len(found) >= 4:
            break
    return (min(found)[2], min(found)[0]) if found else (given, None)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 1 if a row has no tiles that fit."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fit", description=__doc__.split("\n\n")[0])
    parser.add_argument("--arch", required=True, help="compute capability times ten, or gfx")
    parser.add_argument("--precision", action="append", choices=("bf16", "tf32", "fp32"))
    parser.add_argument("--kernel", action="append", choices=KERNELS)
    parser.add_argument("--width", action="append")
    options = parser.parse_args(arguments)
    arch: Arch = int(options.arch) if options.arch.isdecimal() else options.arch
    missing = 0
    for kernel, precision, (D_QK, D_V) in product(
        options.kernel or KERNELS, options.precision or ("bf16", "tf32", "fp32"), configs.WIDTHS
    ):
        width = f"{D_QK}x{D_V}"
        if options.width and width not in options.width:
            continue
        if kernel == "attention_bwd_preprocess" and configs.row_width(kernel, 1, D_V) != width:
            continue
        for size in ("large", "small") if len(OWNED[kernel]) == 2 else ("any",):
            key = (kernel, str(arch), precision, width, size)
            like = configs.served_by(arch) if isinstance(arch, int) else 80
            old = configs._configs().get(key) or configs._configs()[(kernel, str(like), *key[2:])]
            given = replace(old, maxnreg=None) if isinstance(arch, str) else old
            config, price = fit(key, given)
            print(f"{' '.join(key)}: {config} ({price and round(price, 3)})", flush=True)
            missing += price is None
            if price is not None and (config != old or key in configs._configs() or isinstance(arch, str)):
                write(configs.FILE, key, config, "from the machine code")
                configs._configs()[key] = config
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
