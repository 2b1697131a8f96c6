"""Runs every benchmark, the most important part first, within a time limit: python -m benchmarks.run --help

All parts run in one process. After a crash or a hang another goes on without the provider or the case to blame.
Records are written as they are made, so a run that is cut off keeps what it had.

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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch

from benchmarks import (
    bench_attention,
    bench_derivatives,
    bench_faces,
    bench_loader,
    bench_spectral_norm,
    bench_start,
    bench_train_step,
    ceilings,
)
from benchmarks.harness import Case, Provider, Target, forget_compiled, measure
from benchmarks.journal import Journal, supervise
from benchmarks.records import OURS, RESULTS, Record, append, append_line
from benchmarks.text import table
from sagan_fast.ops.tf32 import tf32

STALL = 100.0
"""Seconds without a sign of life after which a process hangs."""


@dataclass(frozen=True)
class Part:
    """Cases that run together in one process; `cases` builds each when its turn comes.

    `seconds` is about what one provider takes on one case on an H200, without compiling. `gpu` and `cpu` say where the
    part is run. With `timed` off, results are held against the truth and not timed. With `by_default` off, the part
    runs only when it is named. Blocks, norms and models that torch.compile compiles run in a part named so alone.
    """

    name: str
    build: Callable[[Target], Iterable[Case]]
    seconds: float = 0.5
    gpu: bool = True
    cpu: bool = True
    timed: bool = True
    by_default: bool = True

    def cases(self, target: Target) -> Iterator[Case]:
        """Yield the cases with the part's providers."""
        wanted = self.name.endswith("-compiled")

        def keep(provider: Provider) -> bool:
            compiled = provider.name.endswith("-compiled")
            return compiled or provider.name.startswith(BESIDE) if wanted else not compiled

        yield from (case.only(keep) for case in self.build(target))


BESIDE = ("eager", "parametrization", *OURS)
"""Who runs beside the compiled peers: what they were compiled from, and ours."""

PARTS = (
    Part("gate", bench_attention.gate, 0.4, cpu=False, timed=False),
    Part("attention", bench_attention.standard, 0.5),
    Part("spectral_norm", bench_spectral_norm.cases, 0.8),
    Part("train_step", bench_train_step.cases, 7),
    Part("float32", bench_attention.float32, 0.5, cpu=False),
    Part("attention-compiled", bench_attention.standard, 0.5, cpu=False),
    Part("spectral_norm-compiled", bench_spectral_norm.cases, 0.8, cpu=False),
    Part("train_step-compiled", bench_train_step.cases, 7, cpu=False),
    Part("sweep", bench_attention.sweep, 0.5),
    Part("train_step-large", bench_train_step.large, 20, cpu=False),
    Part("dtypes", bench_attention.dtypes, 0.5, cpu=False),
    Part("derivatives", bench_derivatives.cases, 4, by_default=False),
    Part("loader", bench_loader.cases, 10, by_default=False),
    Part("start", bench_start.cases, 20, gpu=False, by_default=False),
    Part("faces", bench_faces.cases, 1, cpu=False, by_default=False),
)
"""All parts, the most important first: a run that is cut short has those."""
WARMERS = 4
"""Processes that compile what the timed parts need while the gate and the tests run."""
START_S = 8.0
"""Until a process has imported PyTorch and made its CUDA context."""


class Estimate(NamedTuple):
    """How long a part takes: `runs`, a provider on a case each, and the seconds they run and compile."""

    name: str
    runs: int
    run_s: float
    compile_s: float = 0.0

    @property
    def seconds(self) -> float:
        """Of the whole part."""
        return self.run_s + self.compile_s


def estimates(
    parts: Sequence[Part], target: Target, text: str = "", cached: bool = False, tests_s: float = 0.0
) -> list[Estimate]:
    """Return an estimate for each part, and for the tests after the gate where they take `tests_s`.

    Nothing is compiled twice. With `cached` our kernels are at hand already. What the warmers compile during the tests
    is read in a fifth of the time.
    """
    found, start, seen, share = [], START_S, set(), 1.0
    for part in parts:
        runs = [(case, p) for case in part.cases(target) if text in case.title for p in case.providers]
        costs = {(case.shape, case.dtype, case.mode, p.name): p.compile_s for case, p in runs}
        compile_s = sum(s for key, s in costs.items() if key not in seen and not (cached and key[-1] in OURS))
        seen |= costs.keys()
        found.append(Estimate(part.name, len(runs), start + part.seconds * len(runs), share * compile_s))
        start = 0.0
        if part.name == "gate" and tests_s:
            found.append(Estimate("tests", 0, tests_s))
            start, share = START_S, 0.2
    return found


def schedule(found: Sequence[Estimate], minutes: float) -> str:
    """Return the estimates as a table, and a sentence on the parts that do not fit into so many minutes."""
    ends = list(itertools.accumulate(one.seconds for one in found))
    rows = [[*one[:2], *(f"{s:.0f}" for s in (*one[2:], end))] for one, end in zip(found, ends, strict=True)]
    late = [one.name for one, end in zip(found, ends, strict=True) if end > 60 * minutes]
    fits = max((end for end in ends if end <= 60 * minutes), default=0.0)
    said = f"Estimates for an H200: {fits:.0f} s of a total of {ends[-1]:.0f} s fit the {60 * minutes:.0f} s given.\n"
    if late:
        said += f"Left for a second call, where no time is left: --only {','.join(late)}\n"
    return table("part | runs | run s | compile s | ends at s", rows) + "\n" + said


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
        return warm(chosen, replace(target, compile_only=True), *(int(number) for number in options.warm.split("/")))
    if target.dry_run and os.environ.get("TRITON_INTERPRET") != "1":  # must be there before any kernel is imported
        again = [sys.executable, "-m", "benchmarks.run", *given]
        return subprocess.run(again, env={**os.environ, "TRITON_INTERPRET": "1"}).returncode
    deadline = time.monotonic() + options.minutes * 60
    if options.part:
        for part in chosen:
            run_part(part, target, text, deadline, options)
        return 0
    if target.gpu:
        print(schedule(estimates(chosen, Target("cuda"), text), options.minutes), flush=True)
    done = supervised([part.name for part in chosen], given, deadline, options.stall)
    print(f"benchmarks: records in {options.out or RESULTS}")
    return 0 if done else 1


def supervised(names: Sequence[str], given: Sequence[str], deadline: float, stall: float = STALL) -> bool:
    """Run the parts in one process with the arguments `given`, and in another after each crash; see `supervise`."""
    command = [sys.executable, "-m", "benchmarks.run", *given, *(f"--part={name}" for name in names)]
    with tempfile.TemporaryDirectory() as folder:
        return supervise(command, Path(folder) / "journal", deadline, stall)


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
    about = "parts, text in the title of a case, or both: 'attention,sweep N256'"
    add("--only", default="", metavar="TEXT", help=about)
    add("--minutes", type=float, default=9.0, help="start no case after this time (default 9)")
    add("--device", choices=("cuda", "cpu"), default=device, help="where to measure (default: cuda if available)")
    add("--rounds", type=int, help="samples of each implementation (default 21 on a GPU, 7 on the CPU)")
    add("--out", type=Path, help="folder of the records (default benchmarks/results)")
    add("--stall", type=float, default=STALL, help=f"stop a case after so many seconds without output ({STALL:.0f})")
    about = "run the GPU's cases on the CPU at small sizes; record nothing, or dry-run.jsonl if --out is given"
    add("--dry-run", action="store_true", help=about)
    here = "run this part in this process; may be repeated"
    add("--part", action="append", choices=[part.name for part in parts], metavar="PART", help=here)
    add("--journal", type=Path, help="with --part: file with the progress and failures of earlier tries")
    add("--warm", metavar="I/N", help="compile the I-th of N shares of the compiled peers; time nothing")
    return parser.parse_args(argv)


def choose(parts: Sequence[Part], target: Target, options: argparse.Namespace) -> tuple[list[Part], str]:
    """Return the parts to run on `target`, none where a named one is not run there, and the text a title must hold."""
    here = [part for part in parts if (part.gpu if target.gpu else part.cpu)]
    first, _, rest = options.only.partition(" ")
    names, text = first.split(","), rest
    if not {part.name for part in parts}.issuperset(names):
        names, text = [], options.only
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
        name = f"{part.name}: {case.title}"
        if name in journal.done or text not in case.title:
            continue
        if time.monotonic() > deadline:
            skipped += 1
            continue
        limits = part.timed and not target.dry_run and any(case.needs)
        if limits and "ceilings" not in journal.done:
            for record in ceilings.records(target.device):
                append(record, target.device, options.out or RESULTS)
            journal.finish("ceilings")
        bound = functools.partial(ceilings.bound, device=target.device) if limits else None
        mark = functools.partial(journal.begin, name)
        with tf32(case.dtype == "tf32"), mock.patch.object(torch, "compile", compiling):  # cuDNN's default is TF32
            records = measure(case, target.device, *effort, bound, mark, journal.lost.get(name, {}))
        print(describe(records), flush=True)
        for record in records:
            if not target.dry_run:
                append(record, target.device, options.out or RESULTS)
            elif options.out:
                append_line(options.out / "dry-run.jsonl", asdict(record))
        journal.finish(name)
        done += 1
    late = f", {skipped} not started for lack of time" if skipped else ""
    unkept = "; nothing recorded" if target.dry_run and not options.out else ""
    print(f"benchmarks: {part.name}: {done} cases{late}{unkept}", flush=True)


def warm(parts: Sequence[Part], target: Target, index: int, count: int) -> int:
    """Compile every `count`-th of the compiled providers into the caches on disk, while something else runs.

    All of them together take half of the GPU's memory at most. What does not fit is compiled when its turn comes.
    """
    if target.device == "cuda":
        torch.cuda.set_per_process_memory_fraction(0.5 / count)
    timed = [part for part in parts if part.timed]
    everything = ((case, p) for part in timed for case in part.cases(target) for p in case.providers if p.compile_s)
    for case, provider in itertools.islice(everything, index, None, count):
        try:
            with tf32(case.dtype == "tf32"):  # a part of the key under which Inductor keeps graphs
                provider.prepare()(0)
        except Exception as error:
            print(f"{case.shape} {provider.name}: {type(error).__name__}", flush=True)
        forget_compiled()
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
