"""Trains presets on real data with eager and with our kernels from the same seeds, and compares their loss curves.

    python -m benchmarks.gpu_train --data tiny-imagenet-64=folder:PATH --data cifar-32=folder:PATH --minutes 9

Each call goes on where the last one stopped, run by run, until all have `--steps` steps. A preset whose runs are done
gets a record and a sentence: images a second, and whether the losses of the two backends differ by no more than those
of different seeds. With `--features FILE` the averaged generators' samples are scored too, by their Frechet distance
from the data. FILE is a TorchScript extractor; `--save-features FILE` writes one where there is a network.
"""

import argparse
import functools
import itertools
import json
import shutil
import signal
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.records import MODES, RESULTS, Record, append
from sagan_fast.training.config import TrainConfig
from sagan_fast.training.loop import train

SEEDS = (0, 1, 2)
CURVES = ("d_loss", "g_loss")
Scores = Callable[[Path], float]


def lines(run: Path) -> list[dict[str, Any]]:
    """Return the lines of the run's log, an empty list if it has not begun."""
    path = run / "log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def is_done(run: Path, steps: int) -> bool:
    """Return whether the run has done `steps` steps."""
    return any(line["step"] >= steps for line in lines(run))


def distance(a: Sequence[dict[str, Any]], b: Sequence[dict[str, Any]]) -> float:
    """Return the mean absolute difference of the two runs' losses over their common steps."""
    pairs = [(x, y) for x in a for y in b if x["step"] == y["step"]]
    return statistics.fmean(abs(x[name] - y[name]) for x, y in pairs for name in CURVES)


def agreement(logs: dict[tuple[str, int], list[dict[str, Any]]], backends: Sequence[str]) -> dict[str, float]:
    """Return the mean distance between backends at the same seed, and between seeds of the first backend."""
    first, second = backends
    seeds = sorted({seed for _, seed in logs})
    pairs = [(logs[first, s], logs[first, t]) for s, t in itertools.combinations(seeds, 2)]
    return {
        "between_backends": statistics.fmean(distance(logs[first, s], logs[second, s]) for s in seeds),
        "between_seeds": statistics.fmean(distance(*pair) for pair in pairs),
    }


def score(run: Path, spec: str, features: str, count: int, device: str) -> float:
    """Return the Frechet distance between `count` samples of the run's averaged generator and `spec`.

    It is kept in the run's folder, so a second call computes nothing.
    """
    path = run / f"frechet-{count}.json"
    if not path.exists():
        from sagan_fast.cli import main

        given = dict(data=spec, features=features, count=count, reference_count=count, keep=min(count, 2000))
        given |= dict(device=device, metrics="fid", json=path)
        if status := main(["evaluate", str(run), *(f"--{name}={value}" for name, value in given.items())]):
            raise SystemExit(status)
    return float(json.loads(path.read_text())["fid"])


def summarise(
    preset: str, root: Path, steps: int, backends: Sequence[str], device: str, out: Path, scores: Scores | None = None
) -> str:
    """Record the throughput and agreement of the preset's runs, which are all done, and return a sentence."""
    logs = {(b, s): lines(root / f"{preset}-{b}-{s}") for b in backends for s in SEEDS}
    found = agreement(logs, backends)
    agree = found["between_backends"] <= found["between_seeds"]
    said = []
    (out / "samples").mkdir(parents=True, exist_ok=True)
    for backend in backends:
        mine = [logs[backend, seed] for seed in SEEDS]
        rate = statistics.median(line["images_per_s"] for log in mine for line in log[1:] or log)
        said.append(f"{backend} {rate:.0f} images/s")
        config: dict[str, Any] = dict(steps=steps, seeds=len(SEEDS), images_per_s=rate, agree=agree, **found)
        if scores is not None:
            config["frechet"] = values = [scores(root / f"{preset}-{backend}-{seed}") for seed in SEEDS]
            said[-1] += f" (Frechet {statistics.fmean(values):.2f} +- {statistics.stdev(values):.2f})"
        config["curve"] = [[line["step"], *(round(line[name], 4) for name in CURVES)] for line in mine[0]]
        dtype = "bf16" if device == "cuda" else "fp32"
        append(Record("train", preset, dtype, MODES[1], backend, "eager", config=config), device, out)
        grid = max((root / f"{preset}-{backend}-{SEEDS[0]}" / "samples").glob("*.png"))
        shutil.copy(grid, out / "samples" / f"{preset}-{backend}.png")
    verdict = "agree within" if agree else "DIFFER BY MORE THAN"
    numbers = f"({found['between_backends']:.3f} against {found['between_seeds']:.3f})"
    return f"{preset}: {', '.join(said)}; the backends {verdict} the spread of seeds {numbers}"


def main(argv: Sequence[str] | None = None) -> int:
    """Go on with all runs for so many minutes; return 0, 1 if backends disagree, 2 with a sentence on bad input."""
    options = parse(argv)
    if options.save_features:
        from sagan_fast.evaluation.features import open_extractor, save_extractor

        save_extractor(open_extractor("efficientnet-lite0"), options.save_features)
        print(f"benchmarks.gpu_train: wrote {options.save_features}")
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks.gpu_train: PyTorch finds no CUDA device here", file=sys.stderr)
        return 2
    if not options.data or not all("=" in item for item in options.data):
        print("benchmarks.gpu_train: --data PRESET=SPEC must be given, e.g. cifar-32=folder:PATH", file=sys.stderr)
        return 2
    verdicts: list[str] = []
    deadline = time.monotonic() + options.minutes * 60
    # a training run takes SIGTERM itself, and stops for it with a checkpoint
    before = signal.signal(signal.SIGTERM, _time_is_up)
    signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGTERM))
    try:
        signal.setitimer(signal.ITIMER_REAL, max(options.minutes * 60, 1e-6))
        for item in options.data:
            verdicts.append(go_on(*item.split("=", 1), deadline, options))
            print(verdicts[-1], flush=True)
    except TimeUp:
        for item in options.data[len(verdicts) :]:
            print(f"{item.split('=')[0]}: not all runs are done and scored; call this again to go on", flush=True)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGTERM, before)
    return 1 if any("DIFFER" in verdict for verdict in verdicts) else 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_train",
        description="Compare loss curves: train presets with eager and with our kernels from the same seeds.",
    )
    add = parser.add_argument
    add("--data", action="append", default=[], metavar="PRESET=SPEC", help="preset and its data set; may be repeated")
    add("--steps", type=int, default=1500, help="number of steps per run (default 1500)")
    add("--minutes", type=float, default=9.0, help="write checkpoints and stop after this time (default 9)")
    add("--runs", type=Path, default=Path("runs/gpu-train"), help="folder of the runs (default runs/gpu-train)")
    add("--out", type=Path, default=RESULTS, help="folder of the records (default benchmarks/results)")
    add("--features", help="network for Frechet distances of the samples: a TorchScript file, or efficientnet-lite0")
    add("--score-count", type=int, default=10_000, help="number of samples for the distances (default 10000)")
    add("--save-features", type=Path, metavar="FILE", help="write efficientnet-lite0 to FILE and exit")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="where to train (default cuda)")
    add("--narrow", type=int, help="base channels of both networks, for a trial on the CPU")
    add("--batch-size", type=int, help="batch size instead of the preset's, for a trial on the CPU")
    return parser.parse_args(argv)


class TimeUp(Exception):
    """The minutes are over."""


def _time_is_up(*_: object) -> None:
    raise TimeUp


def go_on(preset: str, spec: str, deadline: float, options: argparse.Namespace) -> str:
    """Train what is left of the preset's runs, and return the sentence of `summarise`.

    Raises TimeUp at the deadline, a reading of `time.monotonic`: runs have checkpoints then, and scores are kept.
    """
    backends = ("eager", "triton") if options.device == "cuda" else ("eager", "sdpa")
    for seed in SEEDS:
        for backend in backends:
            run = options.runs / f"{preset}-{backend}-{seed}"
            if not is_done(run, options.steps) and time.monotonic() < deadline:
                train(_config(preset, spec, backend, seed, run, options), resume=True)
            if not is_done(run, options.steps):
                raise TimeUp
    given = dict(spec=spec, features=options.features, count=options.score_count, device=options.device)
    scores = functools.partial(score, **given) if options.features else None
    return summarise(preset, options.runs, options.steps, backends, options.device, options.out, scores)


def _config(preset: str, spec: str, backend: str, seed: int, run: Path, options: argparse.Namespace) -> TrainConfig:
    narrow = {"base_channels": options.narrow} if options.narrow else {}
    overrides: dict[str, Any] = {"batch_size": options.batch_size} if options.batch_size else {}
    return TrainConfig.from_preset(
        preset, data=spec, out=str(run), backend=backend, seed=seed, steps=options.steps, device=options.device,
        log_every=max(1, options.steps // 30), sample_every=options.steps,
        checkpoint_every=max(1, options.steps // 3), num_workers=0 if options.device == "cpu" else 8,
        generator=narrow, discriminator=narrow, **overrides,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
