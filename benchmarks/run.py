"""Runs every benchmark, the most important part first, within a time limit: python -m benchmarks.run --help

Each part runs in a process of its own. A process that crashes or hangs is started again without the case or the
provider to blame. Records are written as they are made, so a run that is cut off keeps what it had.

A bench is one file, `bench_NAME.py`: a function that builds a `Case` (its inputs, its float64 truth, its providers), a
function that yields the cases of a `Target`, and a place in `PARTS` below.
"""

import argparse
import functools
import itertools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch

from benchmarks import bench_attention, bench_loader, bench_spectral_norm, bench_train_step, ceilings
from benchmarks.harness import Case, Target, measure
from benchmarks.journal import Journal, supervise
from benchmarks.records import RESULTS, Record, append, results_file
from benchmarks.text import table
from sagan_fast.ops.tf32 import tf32


@dataclass(frozen=True)
class Part:
    """Cases that run together in one process; `cases` builds each when its turn comes.

    `gpu` and `cpu` say where the part is run. With `timed` off, results are held against the truth and not timed. With
    `by_default` off, the part runs only when it is named.
    """

    name: str
    cases: Callable[[Target], Iterable[Case]]
    gpu: bool = True
    cpu: bool = True
    timed: bool = True
    by_default: bool = True


PARTS = (
    Part("gate", bench_attention.gate, cpu=False, timed=False),
    Part("attention", bench_attention.quick),
    Part("spectral_norm", bench_spectral_norm.cases),
    Part("attention-compiled", bench_attention.standard, cpu=False),
    Part("train_step", bench_train_step.cases),
    Part("sweep", bench_attention.sweep),
    Part("dtypes", bench_attention.dtypes, cpu=False),
    Part("loader", bench_loader.cases, by_default=False),
)
"""All parts, the most important first: a run that is cut short has those."""


def main(argv: Sequence[str] | None = None, parts: Sequence[Part] = PARTS) -> int:
    """Run what is asked for of `parts`, in their order.

    Returns the exit status: 0, 1 if a part failed, 2 with a sentence if it cannot run here.
    """
    given = sys.argv[1:] if argv is None else argv
    options = parse(given, parts)
    target = Target("cpu" if options.dry_run else options.device, options.dry_run)
    if target.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks: --device cuda was asked for, but PyTorch finds no CUDA device", file=sys.stderr)
        return 2
    chosen, text = choose(parts, target, options)
    if not chosen:
        print(f"benchmarks: {options.only} is not run on {'a GPU' if target.gpu else 'the CPU'}", file=sys.stderr)
        return 2
    if options.warm:
        return warm(chosen, target, *(int(number) for number in options.warm.split("/")))
    again = [sys.executable, "-m", "benchmarks.run", *given]
    if target.dry_run and os.environ.get("TRITON_INTERPRET") != "1":  # must be there before any kernel is imported
        return subprocess.run(again, env={**os.environ, "TRITON_INTERPRET": "1"}).returncode
    deadline = time.monotonic() + options.minutes * 60
    if options.part or target.dry_run:
        for part in chosen:
            run_part(part, target, text, deadline, options)
        return 0
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        for part in chosen:
            left = (deadline - time.monotonic()) / 60
            if left <= 0:
                print(f"benchmarks: no time left for {part.name}", flush=True)
                continue
            command = [*again, "--minutes", f"{left:.2f}", "--part", part.name]
            failed += not supervise(command, Path(folder) / part.name, deadline + 20, options.stall)
    print(f"benchmarks: records in {results_file(target.device, options.out)}")
    return 1 if failed else 0


def parse(argv: Sequence[str] | None, parts: Sequence[Part]) -> argparse.Namespace:
    """Parse the command line."""
    names = ", ".join(part.name if part.by_default else f"{part.name} (only if named)" for part in parts)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run",
        description="Time our code and its peers (other implementations); append one record per time to --out.",
        epilog=f"Parts, the most important first: {names}. A GPU runs all of them, the CPU only some.",
    )
    add = parser.add_argument
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--only", default="", metavar="TEXT", help="a part, text in the title of a case, or both: 'sweep N256'")
    add("--minutes", type=float, default=9.0, help="start no case after this time (default 9)")
    add("--device", choices=("cuda", "cpu"), default=device, help="where to measure (default: cuda if available)")
    add("--rounds", type=int, help="samples of each implementation (default 21 on a GPU, 7 on the CPU)")
    add("--out", type=Path, default=RESULTS, help="folder of the records (default benchmarks/results)")
    add("--stall", type=float, default=100.0, help="stop a case after so many seconds without output (default 100)")
    add("--dry-run", action="store_true", help="run the GPU's cases on the CPU at small sizes; record nothing")
    here = "run this part in this process; may be repeated"
    add("--part", action="append", choices=[part.name for part in parts], metavar="PART", help=here)
    add("--journal", type=Path, help="with --part: file with the progress and failures of earlier tries")
    add("--warm", metavar="I/N", help="compile the I-th of N shares of the compiled peers; time nothing")
    return parser.parse_args(argv)


def choose(parts: Sequence[Part], target: Target, options: argparse.Namespace) -> tuple[list[Part], str]:
    """Return the parts to run on `target`, none where a named one is not run there, and the text a title must hold."""
    here = [part for part in parts if (part.gpu if target.gpu else part.cpu)]
    first, _, rest = options.only.partition(" ")
    names, text = ([first], rest) if any(part.name == first for part in parts) else (None, options.only)
    if names := options.part or names:
        return [part for part in here if part.name in names], text
    return [part for part in here if part.by_default], text


def run_part(part: Part, target: Target, text: str, deadline: float, options: argparse.Namespace) -> None:
    """Measure the part's cases with `text` in their title in this process.

    No case is started after `deadline`, a reading of `time.monotonic`. A device that computes nothing more ends the
    process with an error, so that `supervise` goes on without the provider to blame.
    """
    journal = Journal(options.journal)
    rounds = options.rounds or (1 if target.dry_run else 7 if target.device == "cpu" else 21)
    effort = (rounds if part.timed else 0, 1 if target.dry_run else 3)
    # a dry run traces compiled peers and does not compile them
    compiling = functools.partial(torch.compile, backend="aot_eager") if target.dry_run else torch.compile
    done = skipped = 0
    for case in part.cases(target):
        if case.title in journal.done or text not in case.title:
            continue
        if time.monotonic() > deadline:
            skipped += 1
            continue
        limits = part.timed and not target.dry_run and any(case.needs)
        if limits and "ceilings" not in journal.done:
            for record in ceilings.records(target.device):
                append(record, target.device, options.out)
            journal.finish("ceilings")
        bound = functools.partial(ceilings.bound, device=target.device) if limits else None
        mark = functools.partial(journal.begin, case.title)
        with tf32(case.dtype == "tf32"), mock.patch.object(torch, "compile", compiling):  # cuDNN's default is TF32
            records = measure(case, target.device, *effort, bound, mark, journal.lost.get(case.title, {}))
        print(describe(records), flush=True)
        for record in () if target.dry_run else records:
            append(record, target.device, options.out)
        journal.finish(case.title)
        done += 1
    late = f", {skipped} not started for lack of time" if skipped else ""
    print(f"benchmarks: {part.name}: {done} cases{late}{'; nothing recorded' if target.dry_run else ''}", flush=True)


def warm(parts: Sequence[Part], target: Target, index: int, count: int) -> int:
    """Compile every `count`-th of the compiled providers into the caches on disk, while something else runs."""
    everything = ((case, p) for part in parts for case in part.cases(target) for p in case.providers if p.compiles)
    for case, provider in itertools.islice(everything, index, None, count):
        try:
            with tf32(case.dtype == "tf32"):  # a part of the key under which Inductor keeps graphs
                provider.prepare()(0)
        except Exception as error:
            print(f"{case.shape} {provider.name}: {type(error).__name__}", flush=True)
        torch.cuda.empty_cache()
    return 0


def describe(records: Sequence[Record]) -> str:
    """Return the records of one case as a table."""
    rows = []
    for r in records:
        images, time = r.config.get("images") or r.config.get("batch_size"), r.p50_us
        rows.append([
            r.provider, r.method, f"{time:.1f}" if time else r.error[:70] or "not timed",
            f"{images / time * 1e6:.0f}" if images and time else "",
            f"{r.bound_us / time:.0%}" if time and r.bound_us else "",
            "" if r.saved_bytes is None else f"{r.saved_bytes / 2**20:.1f}",
            "" if r.relative_rms is None else f"{r.relative_rms:.1e}", r.note,
        ])  # fmt: skip
    first = records[0]
    title = f"{first.benchmark} {first.shape} {first.dtype} {first.mode}"
    columns = "provider | method | p50 us | images/s | of limit | kept MiB | rel. error | note"
    return f"{title}\n{table(columns, rows)}\n"


if __name__ == "__main__":
    sys.exit(main())
