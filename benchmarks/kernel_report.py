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
from benchmarks.shapes import BLOCK_SHAPES
from benchmarks.shipped import Launch, launches

RESULTS = Path(__file__).parent / "results"
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
            failures.append(f"{plan.name} {plan.dtype} {plan.config} sm_{arch}: {result}")
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


def _ratio(done: float, needed: float) -> float | None:
    return round(done / needed, 3) if needed else None


def block_rows(entries: Sequence[Entry], measured: dict[tuple[str, str, str], float]) -> list[dict[str, Any]]:
    """Modelled times of whole blocks, kernels one after another, beside what the block needs and what was measured."""
    shapes = {shape.name: shape for shape in BLOCK_SHAPES}
    groups: dict[tuple[int, str, str], list[Entry]] = {}
    for entry in entries:
        if entry.launch.shape in shapes:
            groups.setdefault((entry.arch, entry.launch.shape, entry.launch.plan.dtype), []).append(entry)
    rows = []
    for (arch, name, dtype), group in groups.items():
        for part in PASSES:
            members = [e for e in group if part == "forward+backward" or e.launch.part == "forward"]
            if part == "forward+backward" and len(members) == len([e for e in group if e.launch.part == "forward"]):
                continue
            backward = part != "forward"
            shape, machine = shapes[name], MACHINES[arch]
            limit, binds = machine.limit_us(
                shape.flops(backward), shape.exps(backward), shape.bytes(dtype, backward), dtype
            )
            largest = max(members, key=lambda e: e.model.overlapped_us or 0)
            overlapped = _sum(e.model.overlapped_us for e in members)
            rows.append(
                {
                    "shape": name,
                    "dtype": dtype,
                    "arch": f"sm_{arch}",
                    "pass": part,
                    "launches": len(members),
                    "modelled_overlapped_us": overlapped,
                    "modelled_resident_us": _sum(e.model.resident_us for e in members),
                    "modelled_serial_us": _sum(e.model.serial_us for e in members),
                    "limit_us": _rounded(limit),
                    "limit_binds": binds,
                    "over_limit": None if overlapped is None else round(overlapped / limit, 2),
                    "binds": f"{largest.model.binds} ({largest.launch.plan.name})",
                    "measured_us": measured.get((name, dtype, part)) if arch == 90 else None,
                }
            )
    return rows


def _sum(values: Iterable[float | None]) -> float | None:
    items = list(values)
    return None if any(value is None for value in items) else round(sum(v for v in items if v is not None), 3)


def read_measured(folder: Path = RESULTS) -> dict[tuple[str, str, str], float]:
    """Median microseconds of our own blocks by (shape, dtype, pass), the newest record of each, from *.jsonl files."""
    found: dict[tuple[str, str, str], float] = {}
    for path in sorted(folder.glob("*.jsonl")) if folder.is_dir() else []:
        for line in path.read_text().splitlines():
            record = json.loads(line) if line.strip() else {}
            if record.get("provider") in ("triton", "sagan_fast") and "p50_us" in record:
                part = PASSES["backward" in str(record.get("benchmark", ""))]
                found[record.get("shape"), record.get("dtype"), part] = record["p50_us"]
    return found


def table(header: Sequence[str], rows: Sequence[Sequence[Any]], markdown: bool = False) -> str:
    """Rows as aligned plain text, or as a Markdown table; None is a dash."""
    cells = [[_text(cell) for cell in row] for row in rows]
    if markdown:
        lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
        return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in cells)])
    widths = [max(len(row[i]) for row in [list(header), *cells]) for i in range(len(header))]
    numeric = [all(_is_number(row[i]) for row in cells) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        columns = zip(row, widths, numeric, strict=True)
        return "  ".join(c.rjust(w) if n else c.ljust(w) for c, w, n in columns).rstrip()

    return "\n".join([line(header), "  ".join("-" * w for w in widths), *map(line, cells)])


def _text(cell: Any) -> str:
    if cell is None:
        return "-"
    if isinstance(cell, float):
        return f"{cell:.2f}" if cell < 100 else f"{cell:.0f}"
    return str(cell)


def _is_number(text: str) -> bool:
    return text == "-" or text.replace(".", "", 1).replace(",", "").isdigit()


KERNEL_HEADER = (
    "kernel", "dtype", "config", "arch", "shape", "regs", "spills", "smem", "hgmma", "hmma", "utchmma", "mufu",
    "ldg128", "blocks/SM", "overlapped", "resident", "serial", "binds", "limit", "x limit",
)  # fmt: skip
BLOCK_HEADER = (
    "shape", "dtype", "arch", "pass", "launches", "overlapped us", "resident us", "serial us", "limit us", "limit is",
    "x limit", "binds", "measured us",
)  # fmt: skip


def kernel_table(rows: Sequence[dict[str, Any]]) -> str:
    """All launches, a line each; times in microseconds."""
    body = []
    for r in rows:
        over = None
        if r["modelled_overlapped_us"] is not None and r["limit_us"]:
            over = r["modelled_overlapped_us"] / r["limit_us"]
        body.append(
            [r[k] for k in ("kernel", "dtype", "config", "arch", "shape", "registers", "spills", "smem", "hgmma")]
            + [r[k] for k in ("hmma", "utchmma", "mufu", "ldg128", "resident_blocks", "modelled_overlapped_us")]
            + [r["modelled_resident_us"], r["modelled_serial_us"], r["binds"], r["limit_us"], over]
        )
    return table(KERNEL_HEADER, body)


def block_table(rows: Sequence[dict[str, Any]], markdown: bool = False) -> str:
    """Whole blocks, a line for each shape, dtype, architecture and pass."""
    keys = ("shape", "dtype", "arch", "pass", "launches", "modelled_overlapped_us", "modelled_resident_us")
    keys += ("modelled_serial_us", "limit_us", "limit_binds", "over_limit", "binds")
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
    body.append(["all, clocks a program", "", "", *(round(m.clocks[pipe]) for pipe in PIPES)])
    done = f"FLOP done/needed {_text(_ratio(m.flops_done, plan.flops))}, exp {_text(_ratio(m.exps_done, plan.exps))}"
    head = (
        f"{plan.name} {plan.dtype} {plan.config} sm_{entry.arch} {entry.launch.shape}: {plan.programs} programs, "
        f"{m.waves:.2f} waves of {m.resident_blocks} a SM (by {m.resident_limit}), {m.binds} binds; {done}"
    )
    mix = [f"  {r.name}: " + " ".join(f"{op} {n}" for op, n in r.opcodes.items()) for r in m.regions[1:]]
    return "\n".join([head, table(header, body), *mix, *(f"  note: {note}" for note in m.notes)])


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
    parser.add_argument("--detail", action="store_true", help="also print clocks by pipe and loop of every launch")
    parser.add_argument("--processes", type=int, default=2, help="compilations at a time (default 2)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status: 1 if a kernel did not compile, 2 if nothing was asked for."""
    options = parse_arguments(arguments)
    wanted = [(launch, arch) for arch in options.arch or sorted(MACHINES) for launch in launches(arch)]
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
        write_markdown(options.markdown, [r for r in blocks if r["arch"] == "sm_90"])
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
