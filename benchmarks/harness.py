"""Times providers of the same work fairly: right answers first, then turn by turn, with inputs not in the cache.

A case has inputs (several sets, used in turn, together larger than the cache), a float64 truth, and providers. A
provider with wrong results is recorded as wrong and never timed. A provider that cannot run is recorded with its
reason. The others take turns, so a change of clocks or load meets all of them.
"""

import ctypes
import gc
import math
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.accuracy import RMS_TOLERANCE, rel_rms
from benchmarks.records import Record

Run = Callable[[int], Sequence[Tensor]]
"""Does the work once on input set i and returns its results: outputs, then gradients."""


@dataclass(frozen=True)
class Target:
    """Where cases run, and whose providers they have.

    `device`, "cuda" or "cpu", holds the tensors. With `dry_run` the CPU walks what a GPU would be given: a GPU's
    providers, in float32 and with sizes cut down. With `compile_only` there is one set of inputs, also on the CPU of a
    GPU's sizes: enough to compile what a GPU runs.
    """

    device: str
    dry_run: bool = False
    compile_only: bool = False

    @property
    def gpu(self) -> bool:
        """Whether the providers, and the list of cases, are a GPU's."""
        return self.dry_run or self.compile_only or self.device == "cuda"

    @property
    def backend(self) -> str:
        """The backend of our own provider: "triton" for a GPU's, else what "auto" takes."""
        return "triton" if self.gpu else "auto"


@dataclass(frozen=True)
class Provider:
    """One way to do a case's work. `prepare()` builds what runs; it raises where the work cannot be done here."""

    name: str
    prepare: Callable[[], Run]
    note: Callable[[], str] = str
    truth: Callable[[], Sequence[Tensor]] | None = None
    """where it rightly computes something else than the case's truth"""
    compile_s: float = 0.0
    """seconds that compiling takes, a guess, where nothing is cached"""
    timer: Callable[[], float] | None = None
    """takes one sample itself, in microseconds of one call, where the work is no call that can be repeated"""


@dataclass(frozen=True)
class Case:
    """One row of a benchmark: the work, its truth, and who does it."""

    benchmark: str
    shape: str
    dtype: str
    mode: str
    providers: Sequence[Provider]
    truth: Callable[[], Sequence[Tensor]]
    num_sets: int = 1
    repeatable: bool = True
    """whether every call on set 0 has the results of the first"""
    own: Callable[[], Sequence[Tensor]] = list
    """inputs and parameters of set 0, which are not counted as kept for backward"""
    tolerance: float | None = None
    """largest relative RMS error of a result that is timed, instead of `gate`'s"""
    methods: tuple[str, ...] = ("graph", "eager")
    """how it is timed on CUDA"""
    most_rounds: int | None = None
    """no more rounds than this, where a sample takes seconds"""
    config: dict[str, Any] = field(default_factory=dict)
    needs: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """needed FLOP, exponentials and bytes, for the bound; all 0: there is none"""

    @property
    def title(self) -> str:
        """Benchmark, shape, dtype and mode: what tells one case from another."""
        return f"{self.benchmark} {self.shape} {self.dtype} {self.mode}"

    @property
    def gate(self) -> float:
        """The largest relative RMS error of a result that is timed."""
        if self.tolerance is not None:
            return self.tolerance
        # gradients are sums of signed terms in low precision: three times the table of values
        return RMS_TOLERANCE[self.dtype] * (1 if self.mode == "forward" else 3)

    def only(self, keep: Callable[[Provider], bool]) -> "Case":
        """Return the case with those of its providers that `keep` is true for."""
        return replace(self, providers=[p for p in self.providers if keep(p)])


def measure(
    case: Case,
    device: str,
    rounds: int,
    warmup: int = 3,
    bound: Callable[[Case], tuple[float, str]] | None = None,
    mark: Callable[[str], None] = str,
    lost: Mapping[str, str] = MappingProxyType({}),
) -> list[Record]:
    """Return a record for each provider and method (the case's methods on CUDA, "wall" on the CPU).

    Args:
        rounds: in each every provider has its turn; with 0 the results are only held against the truth.
        warmup: calls of each provider before them.
        bound: returns the least time of a case and what sets it.
        mark: is told which provider runs next.
        lost: providers that are not run but recorded with the reason given.

    Raises:
        RuntimeError: the device computes nothing more for this process, after what a provider did.
    """
    methods = ("wall",) if device == "cpu" else case.methods
    records, runs = [], {}
    rounds = min(rounds, case.most_rounds or rounds)
    limit = bound(case) if bound and any(case.needs) else (None, None)

    def record(provider: Provider, method: str, **values: Any) -> None:
        place = (case.benchmark, case.shape, case.dtype, case.mode, provider.name, method)
        records.append(Record(*place, config=case.config, bound_us=limit[0], bound_by=limit[1], **values))

    truths: dict[object, list[Tensor]] = {}
    for provider in case.providers:
        if provider.name in lost:
            record(provider, methods[0], error=f"cannot run: {lost[provider.name]}")
            continue
        mark(provider.name)
        try:
            make = provider.truth or case.truth
            if make not in truths:
                truths[make] = [t.detach().double() for t in make()]
            run = provider.prepare()
            worst = _worst(run(0), truths[make])
            if not worst <= case.gate:  # NaN is wrong too
                record(provider, methods[0], relative_rms=worst, error=f"wrong: relative RMS error {worst:.2g}")
                continue
            memory = _memory(run, device, case.own())
            runs[provider.name] = (provider, run, dict(relative_rms=worst, note=provider.note(), **memory))
        except Exception as error:
            record(provider, methods[0], error=f"cannot run: {type(error).__name__}: {_text(error)}")
            _synchronize(device)
    if rounds == 0:
        for provider, _, values in runs.values():
            record(provider, methods[0], **values)
    for method in methods if rounds else ():
        timed = {}
        for name, (provider, run, values) in runs.items():
            mark(name)
            try:
                timed[name] = provider.timer or _timer(run, case, method, warmup)
            except Exception as error:
                record(provider, method, error=f"cannot run as {method}: {_text(error)}", **values)
                _synchronize(device)
        mark("timing")
        samples: dict[str, list[float]] = {name: [] for name in timed}
        for i in range(rounds):
            for name in random.Random(i).sample(list(timed), len(timed)):  # nobody always follows the same neighbour
                samples[name].append(timed[name]())
        for name, times in samples.items():
            provider, _, values = runs[name]
            p20, p50, p80 = np.quantile(times, [0.2, 0.5, 0.8]).tolist()
            record(provider, method, p20_us=p20, p50_us=p50, p80_us=p80, samples=len(times), **values)
        timed.clear()
    runs.clear()
    forget_compiled()
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    return records


def forget_compiled() -> None:
    """Make torch.compile forget what it compiled: after eight shapes of one function it would go on in eager mode."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()  # after an illegal access, say, this and every later call fails


def _text(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _timer(run: Run, case: Case, method: str, warmup: int) -> Callable[[], float]:
    """Return a function that takes one sample: microseconds of one call, the mean over all input sets.

    Raises RuntimeError if the replay of a graph differs from a call: work went past the capture.
    """
    num_sets = case.num_sets
    for i in range(max(warmup, num_sets)):
        run(i % num_sets)

    def calls() -> None:
        for i in range(num_sets):
            run(i)

    if method == "wall":
        return lambda: sample_us(calls, num_sets, "cpu")
    torch.cuda.synchronize()
    if method == "graph":
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            calls()
        stream.synchronize()
        with torch.cuda.graph(graph):
            results = run(0)
            for i in range(1, num_sets):
                run(i)
        if case.repeatable:
            check_replay(graph.replay, results, run(0), case.gate)
        busy = busy_clocks(graph.replay)
        return lambda: sample_us(graph.replay, num_sets, "cuda", busy)
    return lambda: sample_us(calls, num_sets, "cuda")


def check_replay(replay: Callable[[], Any], results: Sequence[Tensor], expected: Sequence[Tensor], gate: float) -> None:
    """Wipe `results`, call `replay`, and raise RuntimeError unless it writes what is `expected` into them."""
    with torch.no_grad():
        for tensor in results:
            tensor.fill_(float("nan"))
    replay()
    worst = _worst(results, expected)
    if not worst <= gate:
        raise RuntimeError(f"the replay differs from a call: relative RMS {worst:.2g}")


def _worst(results: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    errors = [rel_rms(a, t) for a, t in zip(results, truth, strict=True)]
    return max(errors, key=lambda error: (math.isnan(error), error))  # max alone passes over a later NaN


CLOCKS_PER_S = 2e9
"""No GPU here is clocked higher by much; one that is slower is kept busy for longer."""


def busy_clocks(launch: Callable[[], Any]) -> int:
    """Return for how many clocks the GPU must be busy so that `launch`, of a CUDA graph, returns before it is done.

    That is twice what the longest of three launches takes, and a millisecond at least: a graph of 1,000 nodes takes
    the host much longer than one of ten. Otherwise the first event passes at once and the launch is timed too.
    """
    longest = 0.0
    for turn in range(4):
        torch.cuda.synchronize()
        began = time.perf_counter()
        launch()
        if turn > 0:  # the first uploads the graph
            longest = max(longest, time.perf_counter() - began)
    torch.cuda.synchronize()
    return int(max(1e-3, 2 * longest) * CLOCKS_PER_S)


def sample_us(work: Callable[[], Any], calls: int, device: str, busy_clocks: int = 0) -> float:
    """Return microseconds of one of the `calls` that `work` makes.

    On CUDA the time is the GPU's, between two events. It is kept busy for `busy_clocks` before.
    """
    if device == "cpu":
        began = time.perf_counter()
        work()
        return (time.perf_counter() - began) / calls * 1e6
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    if busy_clocks:
        torch.cuda._sleep(busy_clocks)
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3 / calls


def _memory(run: Run, device: str, own: Sequence[Tensor]) -> dict[str, int | None]:
    """Return the bytes that autograd keeps over one call, each storage once, and the peak of new memory."""
    kept: dict[int, int] = {}
    owned = {tensor.untyped_storage().data_ptr() for tensor in own}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    _synchronize(device)
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    resident = _resident("VmRSS", reset=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run(0)
    _synchronize(device)
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated() - before
    else:
        peak = None if resident is None else _resident("VmHWM") - resident
    return {"saved_bytes": sum(size for ptr, size in kept.items() if ptr not in owned), "peak_bytes": peak}


def _resident(name: str, reset: bool = False) -> Any:
    """Return the bytes of memory that this process has ("VmRSS") or had at most since the last `reset` ("VmHWM").

    None where there is no Linux to ask.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    if reset:
        ctypes.CDLL(None).malloc_trim(0)  # what the allocator holds back would hide new use
        Path("/proc/self/clear_refs").write_text("5")
    return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith(name))
