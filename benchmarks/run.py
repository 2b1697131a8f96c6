"""Every benchmark in order of importance, within a time limit: python -m benchmarks.run [--only TEXT] [--minutes M].

`--device cuda` (default where there is one) or `cpu`. Each part runs in a process of its own, which is started again
without the case or the provider that crashed it or hung. Records are written as they are made: a run cut off keeps what
it had. `--dry-run` walks every case that a GPU would be given on the CPU, with a GPU's providers, shapes cut down, one
round, in this process; nothing is recorded.
"""

from __future__ import annotations

import argparse
import functools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import bench_attention, bench_loader, bench_spectral_norm, bench_train_step, ceilings
from benchmarks.harness import Case, DeviceLost, Effort, measure
from benchmarks.journal import Journal, supervise
from benchmarks.records import RESULTS, Record, append, results_file
from benchmarks.shapes import BLOCK_SHAPES, SAGAN_MATRICES, STANDARD_SHAPES, BlockShape
from benchmarks.text import table
from sagan_fast.ops.tf32 import tf32

Part = Callable[[], Iterator[Case]]
COMPILED = ("compiled", "flex")
"""Providers whose names hold one of these take seconds to tens of seconds to compile."""


def _without_compiled(cases: Iterator[Case]) -> Iterator[Case]:
    for case in cases:
        quick = [p for p in case.providers if not any(word in p.name for word in COMPILED)]
        yield replace(case, providers=quick)


def gpu_parts(device: str = "cuda") -> dict[str, Part]:
    """Return what a GPU is given, part by part in order of importance.

    With `device` "cpu" the same for a dry run: every case with a GPU's providers, in float32 and cut down so that a CPU
    walks all of them in a few minutes.
    """
    dry = device == "cpu"

    def attention(shapes: Sequence[BlockShape] = BLOCK_SHAPES, dtypes: Sequence[str] = ("bf16",)) -> Iterator[Case]:
        sized = [replace(shape, B=1, H=8, W=8) for shape in shapes] if dry else shapes
        return bench_attention.cases(device, dtypes, sized, "cuda")

    def gate() -> Iterator[Case]:
        """The kernels on every shape, held against float64, not timed: what is wrong is known before anything else."""
        for case in attention([replace(shape, B=min(shape.B, 4)) for shape in BLOCK_SHAPES]):
            ours = [p for p in case.providers if p.name in ("eager", "triton")]
            yield replace(case, benchmark="gate", providers=ours)

    matrices = bench_spectral_norm.SMALL[::4] if dry else SAGAN_MATRICES
    steps = (("shapes-32", 2),) if dry else bench_train_step.GPU_CASES
    return {
        "gate": gate,
        "attention": lambda: _without_compiled(attention()),
        "spectral_norm": lambda: bench_spectral_norm.cases(device, matrices, "cuda"),
        "attention-compiled": attention,
        "train_step": lambda: bench_train_step.cases(device, steps, dry, "cuda"),
        "sweep": lambda: _without_compiled(attention(bench_attention.sweep("cuda"))),
        "dtypes": lambda: _without_compiled(attention(STANDARD_SHAPES, ("tf32", "fp16", "fp32"))),
    }


CUDA = gpu_parts()
CPU: dict[str, Part] = {
    "attention": lambda: bench_attention.cases("cpu"),
    "spectral_norm": lambda: bench_spectral_norm.cases("cpu"),
    "train_step": lambda: bench_train_step.cases("cpu", (("shapes-32", 32),)),
    "sweep": lambda: bench_attention.cases("cpu", shapes=bench_attention.sweep("cpu")),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is asked for; return 0, or 2 with a sentence where it cannot be run here."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="parts, or cases whose benchmark, shape, dtype or mode contain this")
    parser.add_argument("--minutes", type=float, default=9.0, help="start no case after this long")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, help="samples of each provider")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the records")
    parser.add_argument("--stall", type=float, default=100.0, help="seconds after which a silent provider is given up")
    parser.add_argument("--dry-run", action="store_true", help="every case, tiny, on the CPU; nothing is recorded")
    parser.add_argument("--part", help="this part alone, in this process")
    parser.add_argument("--journal", type=Path, help="with --part: what was done and lost in earlier tries")
    parser.add_argument("--warm", metavar="I/N", help="compile this share of what is compiled, and time nothing")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available() and not options.dry_run:
        print("benchmarks: --device cuda was asked for, but PyTorch finds no CUDA device", file=sys.stderr)
        return 2
    parts = CUDA if options.device == "cuda" else CPU
    if options.only == "loader":
        return loader(options)
    if options.warm:
        return warm(parts, *(int(number) for number in options.warm.split("/")))
    if options.part:
        return run_part(options.part, parts[options.part], options)
    if options.dry_run and os.environ.get("TRITON_INTERPRET") != "1":  # must be there before any kernel is imported
        command = [sys.executable, "-m", "benchmarks.run", *(sys.argv[1:] if argv is None else argv)]
        return subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}).returncode
    if options.dry_run:
        return dry_run(options)
    exact = [name for name in parts if name == options.only.split(" ")[0]]
    deadline = time.monotonic() + options.minutes * 60
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        for name in exact or parts:
            left = (deadline - time.monotonic()) / 60
            if left <= 0:
                print(f"benchmarks: no time left for {name}", flush=True)
                continue
            command = [sys.executable, "-m", "benchmarks.run", "--part", name, "--device", options.device]
            command += ["--out", str(options.out), "--minutes", f"{left:.2f}"]
            command += ["--rounds", str(options.rounds)] if options.rounds else []
            command += ["--only", options.only] if options.only not in parts else []
            failed += not supervise(command, Path(folder) / f"{name}.jsonl", deadline + 20, options.stall)
    print(f"benchmarks: records in {results_file(options.device, options.out)}")
    return 1 if failed else 0


def dry_run(options: argparse.Namespace) -> int:
    """Walk what a GPU would be given: our kernels in Triton's interpreter, compiled peers traced, not compiled."""
    compile_ = torch.compile
    torch.compile = functools.partial(compile_, backend="aot_eager")  # type: ignore[assignment]
    parts = gpu_parts("cpu")
    try:
        for name in [name for name in parts if name == options.only] or parts:
            narrowed = argparse.Namespace(**{**vars(options), "only": "" if name == options.only else options.only})
            run_part(name, parts[name], narrowed)
    finally:
        torch.compile = compile_
    return 0


def run_part(name: str, part: Part, options: argparse.Namespace) -> int:
    """Measure the part's cases in this process; 0, or 75 where the device was lost and a new process can go on."""
    device = "cpu" if options.dry_run else options.device
    journal = Journal(options.journal)
    rounds = 0 if name == "gate" else options.rounds or (1 if options.dry_run else 7 if device == "cpu" else 21)
    began = time.monotonic()
    done = skipped = 0
    limits = name != "gate" and not options.dry_run
    for case in part():
        title = f"{case.benchmark} {case.shape} {case.dtype} {case.mode}"
        if title in journal.done or (options.only and options.only not in title):
            continue
        if time.monotonic() - began > options.minutes * 60:
            skipped += 1
            continue
        if limits and "ceilings" not in journal.done:
            for record in ceilings.records(device):
                append(record, device, options.out)
            journal.finish("ceilings")
        bound = functools.partial(ceilings.bound, device=device) if limits else None
        try:
            with tf32(case.dtype == "tf32"):  # cuDNN's default is TF32
                records = measure(
                    case, device, Effort(rounds, warmup=1 if options.dry_run else 3), bound,
                    lambda who, t=title: journal.begin(t, who), journal.lost.get(title),
                )  # fmt: skip
        except DeviceLost as error:
            journal.lose(title, error.provider, error.why)
            print(f"{title}: {error.provider} took the device along: {error.why}", flush=True)
            return 75
        print(describe(records), flush=True)
        if not options.dry_run:
            for record in records:
                append(record, device, options.out)
        journal.finish(title)
        done += 1
    late = f", {skipped} not started for lack of time" if skipped else ""
    print(f"benchmarks: {name}: {done} cases{late}{'; nothing recorded' if options.dry_run else ''}", flush=True)
    return 0


def loader(options: argparse.Namespace) -> int:
    """Measure the data loader, which has no cases."""
    device = "cpu" if options.dry_run else options.device
    size = bench_loader.TINY if options.dry_run else bench_loader.FULL
    done = 0
    for records in bench_loader.records(device, Effort(rounds=options.rounds or (1 if options.dry_run else 7)), size):
        print(describe(records), flush=True)
        for record in () if options.dry_run else records:
            append(record, device, options.out)
        done += 1
    print(f"benchmarks: {done} cases; {'nothing recorded' if options.dry_run else 'loader'}", flush=True)
    return 0


def warm(parts: dict[str, Part], index: int, count: int) -> int:
    """Compile every `count`-th of the compiled providers into the caches on disk, while something else runs."""
    number = 0
    for name in ("attention-compiled", "spectral_norm", "train_step"):
        for case in parts[name]() if name in parts else ():
            for provider in case.providers:
                if any(word in provider.name for word in COMPILED):
                    number += 1
                    if number % count == index:
                        try:
                            with tf32(case.dtype == "tf32"):  # a part of the key under which Inductor keeps graphs
                                provider.prepare()(0)
                        except Exception as error:
                            print(f"{case.shape} {provider.name}: {type(error).__name__}", flush=True)
                        torch.cuda.empty_cache()
    return 0


def describe(records: Sequence[Record]) -> str:
    """Return the records of one case as a table, and the ratio of the best peer to each."""
    rows = []
    for record in records:
        what = f"{record.p50_us:.1f}" if record.p50_us is not None else record.error[:70] or "not timed"
        share = f"{record.bound_us / record.p50_us:.0%}" if record.p50_us and record.bound_us else ""
        saved = "" if record.saved_bytes is None else f"{record.saved_bytes / 2**20:.1f}"
        wrong = "" if record.relative_rms is None else f"{record.relative_rms:.1e}"
        rows.append([record.provider, record.method, what, share, saved, wrong, record.note])
    first = records[0]
    title = f"{first.benchmark} {first.shape} {first.dtype} {first.mode}"
    header = ["provider", "method", "p50 us", "of limit", "kept MiB", "rel. error", "note"]
    return f"{title}\n{table(header, rows)}\n"


if __name__ == "__main__":
    sys.exit(main())
