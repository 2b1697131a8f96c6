"""Trains presets on real data with eager and with our kernels from the same seeds, and holds the curves together.

    python -m benchmarks.gpu_train --data tiny-imagenet-64=folder:PATH --data cifar-32=folder:PATH --minutes 9

Resumable: every call goes on where the last one stopped, run by run, until all have `--steps` steps. A summary of what
is finished is written each time: images a second, and whether the losses of the two backends differ by no more than
those of different seeds do. With `--features FILE` (a TorchScript extractor, made where there is a network by
`python -m benchmarks.gpu_train --save-features FILE`) the averaged generators' samples are scored too, by their Frechet
distance from the data.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.records import RESULTS, Record, append
from sagan_fast.training.config import TrainConfig
from sagan_fast.training.loop import train

SEEDS = (0, 1, 2)
CURVES = ("d_loss", "g_loss")
Scores = Callable[[Path], float]


def lines(run: Path) -> list[dict[str, Any]]:
    """Return the lines of the run's log, none if it has not begun."""
    path = run / "log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def distance(a: Sequence[dict[str, Any]], b: Sequence[dict[str, Any]]) -> float:
    """Return the mean absolute difference of the two runs' losses over their common steps."""
    pairs = [(x, y) for x in a for y in b if x["step"] == y["step"]]
    return statistics.fmean(abs(x[name] - y[name]) for x, y in pairs for name in CURVES)


def agreement(logs: dict[tuple[str, int], list[dict[str, Any]]], backends: Sequence[str]) -> dict[str, float]:
    """Return the mean distance between backends at the same seed, and between seeds of the first backend."""
    first, second = backends
    seeds = sorted({seed for _, seed in logs})
    return {
        "between_backends": statistics.fmean(distance(logs[first, s], logs[second, s]) for s in seeds),
        "between_seeds": statistics.fmean(
            distance(logs[first, s], logs[first, t]) for s in seeds for t in seeds if s < t
        ),
    }


def score(run: Path, spec: str, features: str, count: int, device: str) -> float:
    """Return the Frechet distance of `count` samples of the run's averaged generator from `spec`; kept in the run."""
    path = run / f"frechet-{count}.json"
    if not path.exists():
        from sagan_fast.data import open_dataset
        from sagan_fast.evaluation.evaluate import evaluate_generator
        from sagan_fast.evaluation.features import open_extractor
        from sagan_fast.evaluation.protocol import Protocol
        from sagan_fast.models.checkpoint import load_generator

        generator = load_generator(run / "checkpoints" / "last.pt", average=True, device=device)
        dataset = open_dataset(spec, resolution=generator.config.resolution)
        extractor = open_extractor(features, device=device)
        protocol = Protocol(count=count, reference_count=count, keep=min(count, 2000))
        result = evaluate_generator(generator, dataset, extractor, protocol, metrics=("fid",))
        assert result is not None  # one process
        path.write_text(json.dumps(result))
    return float(json.loads(path.read_text())["fid"])


def summarise(
    preset: str, root: Path, steps: int, backends: Sequence[str], device: str, out: Path, scores: Scores | None = None
) -> str | None:
    """Record the preset's throughput and agreement once all its runs are done; return a sentence, or None before."""
    logs = {(b, s): lines(root / f"{preset}-{b}-{s}") for b in backends for s in SEEDS}
    if not all(log and log[-1]["step"] >= steps for log in logs.values()):
        return None
    found = agreement(logs, backends)
    agree = found["between_backends"] <= found["between_seeds"]
    verdict = "agree within" if agree else "DIFFER BY MORE THAN"
    frechet: dict[str, list[float]] = {}
    if scores is not None:
        frechet = {b: [scores(root / f"{preset}-{b}-{s}") for s in SEEDS] for b in backends}
    rates = {}
    for backend in backends:
        rates[backend] = statistics.median(
            line["images_per_s"] for s in SEEDS for line in logs[backend, s][1:] or logs[backend, s]
        )
        config = {"steps": steps, "seeds": len(SEEDS), "images_per_s": rates[backend], **found, "agree": agree}
        if backend in frechet:
            config["frechet"] = frechet[backend]
        config["curve"] = [
            [line["step"], *(round(line[name], 4) for name in CURVES)] for line in logs[backend, SEEDS[0]]
        ]
        record = Record(
            "train", preset, "bf16" if device == "cuda" else "fp32", "forward+backward", backend, "eager", config=config
        )
        append(record, device, out)
        grid = max((root / f"{preset}-{backend}-{SEEDS[0]}" / "samples").glob("*.png"))
        (out / "samples").mkdir(parents=True, exist_ok=True)
        shutil.copy(grid, out / "samples" / f"{preset}-{backend}.png")
    speeds = ", ".join(f"{backend} {rate:.0f} images/s" for backend, rate in rates.items())
    said = "".join(
        f"; {backend} Frechet {statistics.fmean(values):.2f} +- {statistics.stdev(values):.2f}"
        for backend, values in frechet.items()
    )
    return (
        f"{preset}: {speeds}; the backends {verdict} the spread of seeds "
        f"({found['between_backends']:.3f} against {found['between_seeds']:.3f}){said}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Go on with all runs for so many minutes; return 0, 1 if backends disagree, 2 with a sentence on bad input."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_train", description=__doc__.splitlines()[0])
    parser.add_argument("--data", action="append", default=[], metavar="PRESET=SPEC", help="what to train, and on what")
    parser.add_argument("--steps", type=int, default=1500, help="of every run")
    parser.add_argument("--minutes", type=float, default=9.0, help="stop, with checkpoints, after this long")
    parser.add_argument("--runs", type=Path, default=Path("runs/gpu-train"), help="folder of the runs")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the records")
    parser.add_argument("--features", help="score the samples with this: a TorchScript file, or efficientnet-lite0")
    parser.add_argument("--score-count", type=int, default=10_000, help="samples that a score is from")
    parser.add_argument("--save-features", type=Path, metavar="FILE", help="write efficientnet-lite0 there, and stop")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--narrow", type=int, help="base channels of both networks, for trying it out on a CPU")
    parser.add_argument("--batch-size", type=int, help="for trying it out on a CPU")
    options = parser.parse_args(argv)
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
    backends = ("eager", "triton") if options.device == "cuda" else ("eager", "sdpa")
    deadline = time.monotonic() + options.minutes * 60
    alarm = threading.Timer(options.minutes * 60, os.kill, (os.getpid(), signal.SIGTERM))
    alarm.daemon = True
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # between two runs; within one, the loop stops for it
    alarm.start()
    verdicts = []
    try:
        for item in options.data:
            preset, spec = item.split("=", 1)
            for seed in SEEDS:
                for backend in backends:
                    run = options.runs / f"{preset}-{backend}-{seed}"
                    done = lines(run)
                    if time.monotonic() < deadline and not (done and done[-1]["step"] >= options.steps):
                        signal.signal(signal.SIGTERM, signal.SIG_IGN)
                        train(_config(preset, spec, backend, seed, run, options), resume=True)
            scores: Scores | None = None
            signal.signal(signal.SIGTERM, _time_is_up)  # scores are kept run by run: nothing to save
            if options.features:
                scores = functools.partial(
                    score, spec=spec, features=options.features, count=options.score_count, device=options.device
                )
            verdict = None
            try:
                if time.monotonic() < deadline:
                    verdict = summarise(
                        preset, options.runs, options.steps, backends, options.device, options.out, scores
                    )
            except TimeUp:
                pass
            finally:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
            print(verdict or f"{preset}: not all runs are done and scored; call this again to go on", flush=True)
            verdicts.append(verdict)
    finally:
        alarm.cancel()
        signal.signal(signal.SIGTERM, before)
    return 1 if any(verdict and "DIFFER" in verdict for verdict in verdicts) else 0


class TimeUp(Exception):
    """The minutes are over while scores are computed."""


def _time_is_up(*_: object) -> None:
    raise TimeUp


def _config(preset: str, spec: str, backend: str, seed: int, run: Path, options: argparse.Namespace) -> TrainConfig:
    overrides: dict[str, Any] = {}
    if options.narrow:
        overrides |= dict.fromkeys(("generator", "discriminator"), {"base_channels": options.narrow})
    if options.batch_size:
        overrides["batch_size"] = options.batch_size
    every = max(1, options.steps // 30)
    return TrainConfig.from_preset(
        preset, data=spec, out=str(run), backend=backend, seed=seed, steps=options.steps, device=options.device,
        log_every=every, sample_every=options.steps, checkpoint_every=max(1, options.steps // 3),
        num_workers=0 if options.device == "cpu" else 8, **overrides,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
