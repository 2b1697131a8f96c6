"""Prints registers, spills, shared memory, opcode counts and roofline limits of every kernel; needs no GPU.

    python -m benchmarks.kernel_report                              # everything, as text
    python -m benchmarks.kernel_report --arch 90 --only 64x64-C128
    python -m benchmarks.kernel_report --json FILE                  # one object a launch, for tests and for comparing

Needs torch, triton and numpy. A limit is the least time of the needed work at the chip's peaks, not a forecast; times
measured on the chip stand beside it where benchmarks/results has them.
"""

import argparse
import json
import multiprocessing
import os
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "0"  # before any kernel is imported: the interpreter makes no machine code

from benchmarks.compile import Compiled, compile_key, compile_plan, resources
from benchmarks.machine import MACHINES, SHARED_BYTES
from benchmarks.records import RESULTS, gpus
from benchmarks.shapes import BLOCK_SHAPES
from benchmarks.shipped import BACKWARD, FORWARD, FUNCTIONAL, INFERENCE, Launch, launches
from benchmarks.text import replaced, table

Row = dict[str, Any]
PASSES = {"forward": (INFERENCE,), "forward+backward": (FORWARD, BACKWARD)}
"""The launches of a whole block by the mode of its records: what inference runs, what a training pass runs."""

_JOBS: list[tuple[Launch, int]] = []


def _compile_one(index: int) -> Compiled | str:
    launch, arch = _JOBS[index]
    plan = launch.plan
    try:
        return compile_plan(plan, arch)
    except Exception as error:  # one kernel that does not compile must not hide the others
        reason = (str(error).strip().splitlines() or [""])[-1]
        return f"{plan.name} {plan.dtype} {short_config(plan.config)} sm_{arch}: {type(error).__name__}: {reason}"


def build(wanted: Sequence[tuple[Launch, int]]) -> tuple[list[Row], list[str]]:
    """Compile every distinct kernel of `wanted` (launch, arch) once; return a row a launch, and what failed."""
    keys = [compile_key(launch.plan, arch) for launch, arch in wanted]
    distinct = dict(zip(keys, wanted, strict=True))
    _JOBS[:] = distinct.values()
    results = []
    with multiprocessing.get_context("fork").Pool() as pool:  # kernels do not pickle: inherit them
        for result in pool.imap(_compile_one, range(len(_JOBS))):
            results.append(result)
            if sys.stderr.isatty() or len(results) == len(_JOBS):
                print(f"\rcompiled {len(results)} of {len(_JOBS)}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    compiled = {key: result for key, result in zip(distinct, results, strict=True) if isinstance(result, Compiled)}
    rows = [row(launch, compiled[key]) for key, (launch, _) in zip(keys, wanted, strict=True) if key in compiled]
    return rows, [result for result in results if isinstance(result, str)]


def row(launch: Launch, compiled: Compiled) -> Row:
    """Return one compiled launch as the JSON object of the report; times are microseconds."""
    plan, machine = launch.plan, MACHINES[compiled.arch]
    blocks, blocks_by = machine.resident_blocks(compiled.registers, compiled.warps, compiled.shared, compiled.tmem)
    nbytes = plan.bytes_read + plan.bytes_written
    limit, limit_by = machine.limit_us(plan.flops, plan.exps, nbytes, plan.dtype)
    return {
        "kernel": plan.name,
        "dtype": plan.dtype,
        "config": plan.config,
        "arch": f"sm_{compiled.arch}",
        "shape": launch.shape,
        "pass": launch.part,
        **resources(compiled),
        "smem_cap": SHARED_BYTES[machine.arch],
        "warps": compiled.warps,
        "stages": plan.num_stages,
        "programs": plan.programs,
        "resident_blocks": blocks,
        "resident_limit": blocks_by,
        "flops": plan.flops,
        "exps": plan.exps,
        "bytes": nbytes,
        "limit_us": round(limit, 3),
        "limit_binds": limit_by,
    }


def block_rows(rows: Sequence[Row], measured: dict[tuple[int, str, str, str], float]) -> list[Row]:
    """Return the limits of whole blocks, pass by pass, beside the sum of their launches' limits and what was measured.

    A block needs its inputs and outputs alone, its launches also what passes between them. The products dx, dW_theta,
    dW_phi, dW_g and dW_o, which PyTorch's library computes, are in the block's limit but not in its launches'.
    """
    found = []
    shapes = {shape.name: shape for shape in BLOCK_SHAPES}
    blocks: dict[tuple[str, str, str], list[Row]] = {}
    for r in rows:
        if r["shape"] in shapes:
            blocks.setdefault((r["arch"], r["shape"], r["dtype"]), []).append(r)
    for ((arch, name, dtype), launched), (mode, parts) in product(blocks.items(), PASSES.items()):
        members = [r for r in launched if r["pass"] in parts]
        if {r["pass"] for r in members} != set(parts):
            continue
        shape, number, backward = shapes[name], int(arch.removeprefix("sm_")), mode != "forward"
        needs = shape.flops(backward), shape.exps(backward), shape.bytes(dtype, backward)
        limit, limit_by = MACHINES[number].limit_us(*needs, dtype)
        time = measured.get((number, name, dtype, mode))
        found.append({
            "shape": name, "dtype": dtype, "arch": arch, "pass": mode, "launches": len(members),
            "launches' limits us": round(sum(r["limit_us"] for r in members), 3),
            "limit us": round(limit, 3), "limit is": limit_by,
            "measured us": time or "not measured", "of limit": limit / time if time else "not measured",
        })  # fmt: skip
    return found


def read_measured(folder: Path = RESULTS) -> dict[tuple[int, str, str, str], float]:
    """Return the measured medians of our block in microseconds by architecture, shape, dtype and mode.

    Only records of the very chips in `MACHINES` count, and of them only CUDA-graph replays: the GPU's own time.
    """
    chips = {machine.device: machine.arch for machine in MACHINES.values()}
    return {
        (chips[r["device"]], r["shape"], r["dtype"], r["mode"]): r["p50_us"]
        for records in gpus(folder).values()
        for r in records
        if r["device"] in chips and r["p50_us"] is not None
        if (r["benchmark"], r["provider"], r["method"]) == ("attention", "triton", "graph")
    }


def short_config(config: str) -> str:
    """Return a config in few letters, without what is off: "N128 M64 C64 warps8 stages2"."""
    fields = config[config.find("(") + 1 :].rstrip(")").split(", ")
    kept = [field for field in fields if not field.endswith(("=None", "=False"))]
    return " ".join(kept).replace("BLOCK_", "").replace("num_", "").replace("=True", "").replace("=", "")


LAUNCH_COLUMNS = {
    "kernel": "kernel", "dtype": "dtype", "config": "config", "arch": "arch", "shape": "shape", "pass": "part",
    "registers": "regs", "spills": "spills", "smem": "smem", "hgmma": "hgmma", "hmma": "hmma", "utchmma": "utchmma",
    "mufu": "mufu", "ldg128": "ldg128", "resident_blocks": "blocks/SM", "resident_limit": "by",
    "limit_us": "limit us", "limit_binds": "limit is",
}  # fmt: skip


def launch_table(rows: Sequence[Row], markdown: bool = False) -> str:
    """Return all launches as a table, a line each."""
    cells = [{**r, "config": short_config(r["config"])} for r in rows]
    return table(" | ".join(LAUNCH_COLUMNS.values()), [[r[key] for key in LAUNCH_COLUMNS] for r in cells], markdown)


def block_table(rows: Sequence[Row], markdown: bool = False) -> str:
    """Return whole blocks as a table, a line for each shape, dtype, architecture and pass; "" without any."""
    return table(" | ".join(rows[0]), [list(r.values()) for r in rows], markdown) if rows else ""


BEGIN, END = "<!-- kernel report: begin -->", "<!-- kernel report: end -->"


def write_markdown(path: Path, rows: Sequence[Row], blocks: Sequence[Row]) -> None:
    """Put both tables between the markers of the Markdown file `path`. Raises ValueError without the markers."""
    launched = launch_table([r for r in rows if r["pass"] != FUNCTIONAL], True)
    path.write_text(replaced(path, BEGIN, END, f"\n{block_table(blocks, True)}\n\n{launched}\n"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status: 1 if a kernel did not compile, 2 if nothing was asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernel_report", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--json", type=Path, metavar="FILE", help="write one JSON object per launch to FILE")
    add("--markdown", type=Path, metavar="FILE", help="write the tables between the markers in FILE")
    add("--only", default="", metavar="TEXT", help="only launches with TEXT in the names of kernel, dtype or shape")
    add("--dtype", action="append", help="only this precision; may be repeated")
    add("--arch", type=int, action="append", choices=sorted(MACHINES), help="only this sm_ number; may be repeated")
    options = parser.parse_args(arguments)
    wanted = [
        (launch, arch)
        for arch in options.arch or sorted(MACHINES)
        for launch in launches(arch)
        if options.only in f"{launch.plan.name} {launch.plan.dtype} {launch.shape} {launch.part}"
        and (not options.dtype or launch.plan.dtype in options.dtype)
    ]
    if not wanted:
        print(f"kernel_report: no launch matches --only {options.only!r}", file=sys.stderr)
        return 2
    rows, failures = build(wanted)
    blocks = block_rows(rows, read_measured())
    if options.json:
        options.json.write_text("[\n" + ",\n".join(json.dumps(r) for r in rows) + "\n]\n")
    if options.markdown:
        write_markdown(options.markdown, rows, blocks)
    print(launch_table(rows), end="\n\n")
    print(block_table(blocks))
    for failure in failures:
        print(f"kernel_report: did not compile: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
