"""Measurements as lines of JSON: what was measured, on which device, with which versions. Lines are only appended."""

import datetime
import functools
import json
import os
import platform
import re
import subprocess
from dataclasses import asdict, dataclass, field
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
KEY = ("benchmark", "shape", "dtype", "mode", "provider", "method")
"""What names a measurement: a later record with the same values replaces an earlier one in tables."""
EXECUTED = "executed"
"""The file of what tools without a GPU said of the kernels (tests/evidence.py); its lines are no measurements."""
MODES = ("forward", "forward+backward")
OURS = ("triton", "auto", "group", "ours")
"""The provider that is ours in each benchmark; all others are its peers."""


@dataclass
class Record:
    """One provider on one case. Times are microseconds of one call, quantiles of `samples` samples; None if it failed.

    `method` is "graph" (replay of a CUDA graph: the GPU's time), "eager" (calls from Python, launches included) or
    "wall" (CPU). `saved_bytes` is what autograd keeps for backward beyond inputs and parameters. `peak_bytes` is the
    most memory in use during a call beyond what was there. `bound_us` is the time of the needed work at the rates
    measured on this device in the same run. `relative_rms` is the worst output's error. `error` says why there is no
    time.
    """

    benchmark: str
    shape: str
    dtype: str
    mode: str
    provider: str
    method: str
    p20_us: float | None = None
    p50_us: float | None = None
    p80_us: float | None = None
    samples: int = 0
    relative_rms: float | None = None
    peak_bytes: int | None = None
    saved_bytes: int | None = None
    bound_us: float | None = None
    bound_by: str | None = None
    note: str = ""
    error: str = ""
    config: dict[str, Any] = field(default_factory=dict)


@functools.cache
def environment(device: str) -> dict[str, str]:
    """Return where a record is made: device, driver, versions, commit ("+": with changes), date."""
    import torch  # not above: a process that only keeps a journal or reads records starts at once

    query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    git = ("git", "-C", str(ROOT))
    written = (":!benchmarks/results", ":!docs", ":!README.md")  # by records and report themselves
    changed = _output(*git, "status", "--porcelain", "--untracked-files=no", "--", ".", *written)
    return {
        "device": device_name(device),
        "driver": _output(*query) if device == "cuda" else "",
        "torch": str(torch.__version__),
        "triton": metadata.version("triton") if find_spec("triton") else "",
        "python": platform.python_version(),
        "commit": _output(*git, "rev-parse", "--short", "HEAD") + ("+" if changed else ""),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
    }


def device_name(device: str) -> str:
    """Return the name of the GPU, or of the processor with the number of threads used."""
    import torch

    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    match = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return f"{match[1] if match else platform.machine()}, {torch.get_num_threads()} threads"


def results_file(device: str, folder: Path = RESULTS) -> Path:
    """Return the file of this device's records: results/nvidia-h200.jsonl, results/cpu.jsonl."""
    if device == "cpu":
        return folder / "cpu.jsonl"
    return folder / (re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-") + ".jsonl")


def append(record: Record, device: str, folder: Path = RESULTS) -> None:
    """Add `record` with its environment to the device's file at once, so that a run cut off loses nothing."""
    append_line(results_file(device, folder), {**asdict(record), **environment(device)})


def append_line(path: Path, values: dict[str, Any]) -> None:
    """Add `values` to the file as one whole line of JSON, on the disk when this returns.

    A line that another process began and did not end is ended first.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - 1))
        whole = file.read(1) in (b"", b"\n")
        file.write((b"" if whole else b"\n") + json.dumps(values).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> list[dict[str, Any]]:
    """Return the records in `path`, the last one of each measurement; an empty list if there is no such file."""
    latest: dict[tuple[str, ...], dict[str, Any]] = {}
    for text in path.read_text().splitlines() if path.exists() else ():
        try:
            record = json.loads(text)
        except json.JSONDecodeError:
            continue  # the last line of a run that was killed
        key = tuple(record[name] for name in KEY)
        latest.pop(key, None)
        latest[key] = record
    return list(latest.values())


def gpus(folder: Path = RESULTS) -> dict[str, list[dict[str, Any]]]:
    """Return the records of each GPU that has any, by the name of its file, the one with most records first."""
    paths = [path for path in sorted(folder.glob("*.jsonl")) if path.stem not in ("cpu", EXECUTED)]
    found = {path.stem: read(path) for path in paths}
    return dict(sorted(((name, records) for name, records in found.items() if records), key=lambda item: -len(item[1])))


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""
