"""Every benchmark in order of importance, within a time limit: python -m benchmarks.run --help."""

from __future__ import annotations

import sys

from benchmarks import bench_attention, bench_loader, bench_spectral_norm, bench_train_step
from benchmarks.command import main

_PARTS = {
    part.name: part
    for bench in (bench_attention, bench_spectral_norm, bench_train_step, bench_loader)
    for part in bench.PARTS
}
_FIRST = ("gate", "attention", "spectral_norm", "attention-compiled", "train_step")

PARTS = (*(_PARTS[name] for name in _FIRST), *(part for name, part in _PARTS.items() if name not in _FIRST))
"""All parts, the most important first: a run that is cut short has those."""


if __name__ == "__main__":
    sys.exit(main(PARTS))
