"""Every benchmark in order of importance, within a time limit: python -m benchmarks.run [--only TEXT] [--minutes M].

`--device cuda` (default where there is one) or `cpu`. `--dry-run` walks every case on the CPU, shapes cut down, one
round, records nothing. Records are written as they are made: a run cut off keeps what it had.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import bench_attention, bench_loader, bench_spectral_norm, bench_train_step, ceilings
from benchmarks.harness import Case, Effort, measure
from benchmarks.records import RESULTS, Record, append, results_file
from benchmarks.shapes import BLOCK_SHAPES, STANDARD_SHAPES
from benchmarks.text import table


def plan(device: str, dry: bool) -> Iterator[Case]:
    """Yield every case, the most important first."""
    if dry:
        tiny = [replace(s, B=1, H=8, W=8) for s in BLOCK_SHAPES]
        yield from bench_attention.cases("cpu", shapes=tiny)
        yield from bench_spectral_norm.cases("cpu", bench_spectral_norm.SMALL)
        yield from bench_train_step.cases("cpu", (("shapes-32", 4),), tiny=True)
        return
    if device == "cpu":
        yield from bench_spectral_norm.cases("cpu")
        yield from bench_attention.cases("cpu")
        yield from bench_train_step.cases("cpu", (("shapes-32", 32),))
        return
    yield from bench_spectral_norm.cases("cuda")
    yield from bench_attention.cases("cuda")
    yield from bench_train_step.cases("cuda")
    yield from bench_attention.cases("cuda", ("tf32", "fp16", "fp32"), STANDARD_SHAPES)
    yield from bench_attention.cases("cuda", ("bf16",), bench_attention.sweep())


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is asked for; return 0, or 2 with a sentence where it cannot be run here."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="cases whose benchmark, shape, dtype or mode contains this")
    parser.add_argument("--minutes", type=float, default=9.0, help="start no case after this long")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, help="samples of each provider")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the records")
    parser.add_argument("--dry-run", action="store_true", help="every case, tiny, on the CPU; nothing is recorded")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available() and not options.dry_run:
        print("benchmarks: --device cuda was asked for, but PyTorch finds no CUDA device", file=sys.stderr)
        return 2
    device = "cpu" if options.dry_run else options.device
    began = time.monotonic()
    effort = Effort(rounds=options.rounds or (1 if options.dry_run else 7 if device == "cpu" else 21))
    torch.backends.cuda.matmul.fp32_precision = "ieee"

    def keep(records: Sequence[Record]) -> None:
        print(describe(records), flush=True)
        if not options.dry_run:
            for record in records:
                append(record, device, options.out)

    if device == "cuda" and not options.only:
        keep(ceilings.records())
    done = skipped = 0
    if options.only == "loader":
        for found in bench_loader.records(device, effort, bench_loader.TINY if options.dry_run else bench_loader.FULL):
            keep(found)
            done += 1
    for case in () if options.only == "loader" else plan(device, options.dry_run):
        if options.only and options.only not in f"{case.benchmark} {case.shape} {case.dtype} {case.mode}":
            continue
        if time.monotonic() - began > options.minutes * 60:
            skipped += 1
            continue
        torch.backends.cuda.matmul.fp32_precision = "tf32" if case.dtype == "tf32" else "ieee"
        keep(measure(case, device, effort, bound=ceilings.bound if device == "cuda" else None))
        done += 1
    where = "nothing recorded" if options.dry_run else f"records in {results_file(device, options.out)}"
    late = f", {skipped} not started for lack of time" if skipped else ""
    print(f"benchmarks: {done} cases{late}; {where}")
    return 0


def describe(records: Sequence[Record]) -> str:
    """Return the records of one case as a table, and the ratio of the best peer to each."""
    rows = []
    for record in records:
        what = f"{record.p50_us:.1f}" if record.p50_us is not None else record.error
        share = f"{record.bound_us / record.p50_us:.0%}" if record.p50_us and record.bound_us else ""
        saved = "" if record.saved_bytes is None else f"{record.saved_bytes / 2**20:.1f}"
        rows.append([record.provider, record.method, what, share, saved, record.note])
    first = records[0]
    title = f"{first.benchmark} {first.shape} {first.dtype} {first.mode}"
    return f"{title}\n{table(['provider', 'method', 'p50 us', 'of limit', 'kept MiB', 'note'], rows)}\n"


if __name__ == "__main__":
    sys.exit(main())
