"""Registers, spills, instruction counts and modelled time of every shipped kernel, without a GPU.

    python -m benchmarks.kernel_report                       # everything, as text
    python -m benchmarks.kernel_report --arch 90 --only fwd --detail
    python -m benchmarks.kernel_report --json FILE           # one object a launch, for the tests and for comparing

Needs torch, triton and numpy. Times are modelled (benchmarks/model.py says how), not measured; measured ones stand
beside them where benchmarks/results has records of them.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "0"  # before any kernel is imported: the interpreter makes no machine code

from benchmarks.compile import Compiled, compile_key, compile_plan, resources
from benchmarks.machine import MACHINES
from benchmarks.model import PIPES, Model, model
from benchmarks.records import RESULTS, gpus
from benchmarks.shapes import BLOCK_SHAPES, BlockShape
from benchmarks.shipped import BACKWARD, FORWARD, INFERENCE, Launch, launches, library_products
from benchmarks.text import cell_text, table

PASSES = ("forward", "forward+backward")


@dataclass(frozen=True)
class Entry:
    """One launch, compiled for one architecture and modelled."""

    launch: Launch
    arch: int
    compiled: Compiled
    model: Model


def _compile_one(index: int) -> tuple[int, Compiled | str]:
    plan, arch = _JOBS[index]
    try:
        return index, compile_plan(plan, arch)
    except Exception as error:  # one kernel that does not compile must not hide the others
        return index, f"{type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error).strip() else ''}"


_JOBS: list[tuple[Any, int]] = []


def build(wanted: Sequence[tuple[Launch, int]], processes: int = 2) -> tuple[list[Entry], list[str]]:
    """Compile every distinct kernel of `wanted` (launch, arch) once and model each launch; return entries, failures."""
    keys = [compile_key(launch.plan, arch) for launch, arch in wanted]
    first = {key: (launch.plan, arch) for key, (launch, arch) in reversed(list(zip(keys, wanted, strict=True)))}
    _JOBS[:] = first.values()
    order = list(first)
    compiled: dict[Any, Compiled] = {}
    failures = []
    if processes > 1 and len(_JOBS) > 1:
        with multiprocessing.get_context("fork").Pool(processes) as pool:  # kernels do not pickle: inherit them
            results = _with_progress(pool.imap_unordered(_compile_one, range(len(_JOBS))), len(_JOBS))
    else:
        results = _with_progress(map(_compile_one, range(len(_JOBS))), len(_JOBS))
    for index, result in results:
        if isinstance(result, Compiled):
            compiled[order[index]] = result
        else:
            plan, arch = _JOBS[index]
            failures.append(f"{plan.name} {plan.dtype} {short_config(plan.config)} sm_{arch}: {result}")
    entries = [
        Entry(launch, arch, compiled[key], model(launch.plan, compiled[key], MACHINES[arch]))
        for key, (launch, arch) in zip(keys, wanted, strict=True)
        if key in compiled
    ]
    return entries, failures


def _with_progress(results: Iterable[Any], total: int) -> list[Any]:
    done = []
    for result in results:
        done.append(result)
        end = "\n" if len(done) == total else ""
        if sys.stderr.isatty() or end or len(done) % 50 == 0:
            print(f"\rcompiled {len(done)} of {total}", end=end, file=sys.stderr, flush=True)
    return done


def row(entry: Entry) -> dict[str, Any]:
    """One launch as the JSON object of the report."""
    plan, times = entry.launch.plan, entry.model
    return {
        "kernel": plan.name,
        "dtype": plan.dtype,
        "config": plan.config,
        "arch": f"sm_{entry.arch}",
        "shape": entry.launch.shape,
        "pass": entry.launch.part,
        **resources(entry.compiled),
        "smem_cap": MACHINES[entry.arch].smem_block,
        "warps": entry.compiled.warps,
        "stages": plan.num_stages,
        "programs": plan.programs,
        "resident_blocks": times.resident_blocks,
        "resident_limit": times.resident_limit,
        "waves": round(times.waves, 3),
        "clocks_per_program": {pipe: round(clocks, 1) for pipe, clocks in times.clocks.items()},
        "modelled_overlapped_us": _rounded(times.overlapped_us),
        "modelled_resident_us": _rounded(times.resident_us),
        "modelled_serial_us": _rounded(times.serial_us),
        "binds": times.binds,
        "limit_us": _rounded(times.limit_us),
        "limit_binds": times.limit_binds,
        "flops_done_over_needed": _ratio(times.flops_done, plan.flops),
        "exps_done_over_needed": _ratio(times.exps_done, plan.exps),
        "notes": times.notes,
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def _ratio(done: float | None, needed: float) -> float | None:
    return round(done / needed, 3) if done is not None and needed else None


def block_rows(entries: Sequence[Entry], measured: dict[tuple[int, str, str, str], float]) -> list[dict[str, Any]]:
    """Modelled times of whole blocks, kernels one after another, beside what the block needs and what was measured.

    "forward" is inference, "forward+backward" a training pass; `library_us` is the least time of the products that
    PyTorch's library computes in it, which is in all its modelled times.
    """
    groups: dict[tuple[int, str, str], list[Entry]] = {}
    for entry in entries:
        if entry.launch.shape in _SHAPES:
            groups.setdefault((entry.arch, entry.launch.shape, entry.launch.plan.dtype), []).append(entry)
    rows = []
    for (arch, name, dtype), group in groups.items():
        for part in PASSES:
            wanted = (INFERENCE,) if part == "forward" else (FORWARD, BACKWARD)
            members = [entry for entry in group if entry.launch.part in wanted]
            if {entry.launch.part for entry in members} == set(wanted):
                rows.append(_block_row(_SHAPES[name], dtype, arch, part, members, measured))
    return rows


_SHAPES = {shape.name: shape for shape in BLOCK_SHAPES}


def _block_row(
    shape: BlockShape,
    dtype: str,
    arch: int,
    part: str,
    members: Sequence[Entry],
    measured: dict[tuple[int, str, str, str], float],
) -> dict[str, Any]:
    backward, machine = part != "forward", MACHINES[arch]
    products = library_products(shape, dtype) if backward else []
    library = sum(machine.limit_us(flops, 0, nbytes, dtype)[0] for flops, nbytes in products)
    limit, limit_binds = machine.limit_us(
        shape.flops(backward), shape.exps(backward), shape.bytes(dtype, backward), dtype
    )
    largest = max(members, key=lambda entry: entry.model.overlapped_us or 0)
    overlapped = _sum([library, *(entry.model.overlapped_us for entry in members)])
    return {
        "shape": shape.name,
        "dtype": dtype,
        "arch": f"sm_{arch}",
        "pass": part,
        "launches": len(members),
        "library_us": _rounded(library),
        "modelled_overlapped_us": overlapped,
        "modelled_resident_us": _sum([library, *(entry.model.resident_us for entry in members)]),
        "modelled_serial_us": _sum([library, *(entry.model.serial_us for entry in members)]),
        "limit_us": _rounded(limit),
        "limit_binds": limit_binds,
        "over_limit": None if overlapped is None else round(overlapped / limit, 3),
        "binds": f"{largest.model.binds} of {largest.launch.plan.name}",
        "measured_us": measured.get((arch, shape.name, dtype, part)),
    }


def _sum(values: Iterable[float | None]) -> float | None:
    items = list(values)
    return None if any(value is None for value in items) else round(sum(v for v in items if v is not None), 3)


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


KERNEL_HEADER = (
    "kernel", "dtype", "config", "arch", "shape", "part", "regs", "spills", "smem", "hgmma", "hmma", "utchmma", "mufu",
    "ldg128", "blocks/SM", "overlapped", "resident", "serial", "binds", "limit", "x limit",
)  # fmt: skip
BLOCK_HEADER = (
    "shape", "dtype", "arch", "pass", "launches", "library us", "overlapped us", "resident us", "serial us", "limit us",
    "limit is", "x limit", "binds", "measured us",
)  # fmt: skip


def short_config(config: str) -> str:
    """The numbers of a config with as few letters as tell them apart: "N128 M64 C64 warps8 stages2"."""
    inside = config[config.find("(") + 1 :].rstrip(")")
    return inside.replace("BLOCK_", "").replace("num_", "").replace("=", "").replace(",", "")


def kernel_table(rows: Sequence[dict[str, Any]]) -> str:
    """All launches, a line each; times in microseconds."""
    keys = ["registers", "spills", "smem", "hgmma", "hmma", "utchmma", "mufu", "ldg128", "resident_blocks"]
    keys += ["modelled_overlapped_us", "modelled_resident_us", "modelled_serial_us", "binds", "limit_us"]
    body = []
    for r in rows:
        known = r["modelled_overlapped_us"] is not None and r["limit_us"]
        over = r["modelled_overlapped_us"] / r["limit_us"] if known else None
        names = r["kernel"], r["dtype"], short_config(r["config"]), r["arch"], r["shape"], r["pass"]
        body.append([*names, *(r[key] for key in keys), over])
    return table(KERNEL_HEADER, body)


def block_table(rows: Sequence[dict[str, Any]], markdown: bool = False) -> str:
    """Whole blocks, a line for each shape, dtype, architecture and pass."""
    keys = ["shape", "dtype", "arch", "pass", "launches", "library_us", "modelled_overlapped_us"]
    keys += ["modelled_resident_us", "modelled_serial_us", "limit_us", "limit_binds", "over_limit", "binds"]
    return table(
        BLOCK_HEADER,
        [[*(r[k] for k in keys), "not measured" if r["measured_us"] is None else r["measured_us"]] for r in rows],
        markdown,
    )


def detail(entry: Entry) -> str:
    """Where the clocks of one program go: a line for every loop, clocks by pipe over all of its trips."""
    plan, m = entry.launch.plan, entry.model
    header = ["where", "instructions", "runs", *PIPES]
    body: list[list[Any]] = []
    for region in m.regions:
        clocks = [region.clocks.get(pipe, 0.0) * region.executions for pipe in PIPES]
        body.append([region.name, region.instructions, f"{region.executions:g}", *(round(c) for c in clocks)])
    if m.regions:
        body.append(["all, clocks a program", "", "", *(round(m.clocks[pipe]) for pipe in PIPES)])
    flops, exps = (cell_text(_ratio(*pair)) for pair in ((m.flops_done, plan.flops), (m.exps_done, plan.exps)))
    head = (
        f"{plan.name} {plan.dtype} {short_config(plan.config)} sm_{entry.arch} {entry.launch.shape}: "
        f"{plan.programs} programs, {m.waves:.2f} waves of {m.resident_blocks} a SM (by {m.resident_limit}), "
        f"{m.binds} binds; FLOP done/needed {flops}, exp {exps}"
    )
    mix = [f"  {r.name}: " + " ".join(f"{op} {n}" for op, n in r.opcodes.items()) for r in m.regions[1:]]
    return "\n".join([head, *([table(header, body)] if body else []), *mix, *(f"  note: {note}" for note in m.notes)])


BEGIN, END = "<!-- kernel report: begin -->", "<!-- kernel report: end -->"


def write_markdown(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Put the table of whole blocks between the markers of the Markdown file `path`, which must have them."""
    text = path.read_text()
    if BEGIN not in text or END not in text:
        raise SystemExit(f"kernel_report: {path} must hold the lines {BEGIN} and {END}")
    before, rest = text.split(BEGIN, 1)
    after = rest.split(END, 1)[1]
    body = "**Modelled from the machine code, not measured** (the last column says what was).\n\n" + block_table(
        rows, True
    )
    path.write_text(f"{before}{BEGIN}\n{body}\n{END}{after}")


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernel_report", description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write one object a launch to FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="renew the table between FILE's markers")
    parser.add_argument("--only", default="", metavar="TEXT", help="only launches with TEXT in kernel, dtype or shape")
    parser.add_argument("--dtype", action="append", help="only this precision; may be given several times")
    parser.add_argument(
        "--arch", type=int, action="append", choices=sorted(MACHINES), help="may be given several times"
    )
    parser.add_argument("--contiguous", action="store_true", help="maps in NCHW order instead of channels_last")
    parser.add_argument("--detail", action="store_true", help="also print clocks by pipe and loop of every launch")
    parser.add_argument("--processes", type=int, default=2, help="compilations at a time (default 2)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status: 1 if a kernel did not compile, 2 if nothing was asked for."""
    options = parse_arguments(arguments)
    wanted = [
        (launch, arch) for arch in options.arch or sorted(MACHINES) for launch in launches(arch, not options.contiguous)
    ]
    wanted = [
        (launch, arch)
        for launch, arch in wanted
        if options.only in f"{launch.plan.name} {launch.plan.dtype} {launch.shape} {launch.part}"
        and (not options.dtype or launch.plan.dtype in options.dtype)
    ]
    if not wanted:
        print(f"kernel_report: no launch matches --only {options.only!r}", file=sys.stderr)
        return 2
    entries, failures = build(wanted, options.processes)
    rows = [row(entry) for entry in entries]
    if options.json:
        options.json.write_text("[\n" + ",\n".join(json.dumps(r) for r in rows) + "\n]\n")
    blocks = block_rows(entries, read_measured())
    if options.markdown:
        write_markdown(options.markdown, blocks)
    if options.detail:
        print("\n\n".join(detail(entry) for entry in entries), end="\n\n")
    print(
        "Times are modelled from the machine code, in microseconds; nothing here was measured unless a column says so."
    )
    print(kernel_table(rows), end="\n\n")
    if blocks:
        print(block_table(blocks))
    for failure in failures:
        print(f"kernel_report: did not compile: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
