"""Times the network as published and its rewrites, turn by turn in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from sagan_fast.errors import InputError
from sagan_fast.faces.fused import fuse
from sagan_fast.faces.network import FaceBoxes

Forward = Callable[[Tensor], object]


def forwards(net: FaceBoxes, compile: bool = False) -> dict[str, tuple[Forward, bool]]:
    """Return ways to run `net`, in evaluation, by name: the function of the input, and whether it wants channels_last.

    The first is the network as published. None of them keeps gradients.
    """
    net = net.eval().requires_grad_(False)
    last = FaceBoxes().eval().requires_grad_(False)
    last.load_state_dict(net.state_dict())
    last = last.to(memory_format=torch.channels_last)
    fused = fuse(net)
    half = fuse(net).bfloat16()
    found: dict[str, tuple[Forward, bool]] = {
        "as published": (net, False),
        "as published, channels_last": (last, True),
        "fused": (fused.codes, True),
        "fused, bf16": (lambda x: half.codes(x.bfloat16()), True),
    }
    if compile:
        found["fused, compiled"] = (torch.compile(fuse(net).codes, dynamic=False), True)
    return found


def measured(
    weights: Path, height: int, width: int, threads: int, rounds: int, compile: bool = False
) -> dict[str, float]:
    """Return the median seconds of one forward pass of a random picture, by name, over `rounds` rounds.

    With ONNX Runtime installed, the rewrite runs there too. The number of threads of PyTorch is set back at the end.
    """
    net = FaceBoxes().load_weights(weights)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        plain = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0)) * 255 - 117
        last = plain.contiguous(memory_format=torch.channels_last)
        runs = {
            name: (run, last if wants_last else plain) for name, (run, wants_last) in forwards(net, compile).items()
        }
        if (runtime := _onnx_runtime(net)) is not None:
            runs["fused, ONNX Runtime"] = (runtime, last)
        times: dict[str, list[float]] = {name: [] for name in runs}
        with torch.no_grad():
            for turn in range(rounds + 2):
                for name, (run, x) in runs.items():
                    began = time.perf_counter()
                    run(x)
                    if turn > 1:  # the first two warm up
                        times[name].append(time.perf_counter() - began)
        return {name: statistics.median(taken) for name, taken in times.items()}
    finally:
        torch.set_num_threads(before)


def _onnx_runtime(net: FaceBoxes) -> Forward | None:
    """Return the exported network in ONNX Runtime; None where a package is missing."""
    from sagan_fast.faces.onnx import codes_of_onnx, export_onnx

    with TemporaryDirectory() as folder:
        path = Path(folder, "fused.onnx")
        try:
            export_onnx(net, path)
            return codes_of_onnx(path)
        except InputError:
            return None
