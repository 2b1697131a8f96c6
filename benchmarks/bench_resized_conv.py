"""Forms of a 3x3 convolution with up-sampling before it or pooling after it, by shape: which one is the fastest.

    python -m benchmarks.bench_resized_conv              # minutes; the shapes of feat64 at 128x128, 32 base channels

"plain" resizes and convolves. "folded" is one convolution of 4x4 weights and stride 2 (sagan_fast/ops/resized_conv.py).
"rearranged" is a 2x2 convolution to or from four times the channels, and a pixel shuffle. Times are processor time
of forward, gradient of the input and gradient of the weights; the 4x4 and 2x2 weights are made before. The forms take
turns. What it showed is in docs/log.md, and the rule that follows in `resized_conv.LEAST_PIXELS`.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.text import table
from sagan_fast.ops.resized_conv import Direction, conv2d_down, folded, up_conv2d

SHAPES: dict[Direction, tuple[tuple[int, int, int], ...]] = {
    "up": ((512, 512, 4), (512, 256, 8), (256, 128, 16), (128, 64, 32), (64, 32, 64)),
    "down": ((32, 32, 128), (64, 64, 64), (128, 128, 32), (256, 256, 16), (512, 512, 8)),
}
"""Channels in and out, and the side of the input's map."""
Form = tuple[Callable[[Tensor], Tensor], Tensor]
"""Computes the output, with the weights that the gradient is for."""


def forms(direction: Direction, weight: Tensor, bias: Tensor) -> dict[str, Form]:
    """Return the forms of the convolution with the 3x3 `weight`."""
    layout = torch.channels_last
    wide = folded(weight, direction).contiguous(memory_format=layout)
    weight, wide = (w.detach().requires_grad_() for w in (weight, wide))
    if direction == "up":
        # an output's row is at 2i or 2i + 1: it sees rows i - 1 and i of the input, or i and i + 1
        taps = torch.tensor([[[1.0, 1, 0], [0, 0, 1]], [[1, 0, 0], [0, 1, 1]]])
        narrow = torch.einsum("oikl,qak,pbl->oqpiab", weight.detach(), taps, taps).flatten(0, 2)
        narrow = narrow.contiguous(memory_format=layout).requires_grad_()
        four = bias.repeat_interleave(4)
        return {
            "plain": (lambda x: F.conv2d(F.interpolate(x, scale_factor=2.0), weight, bias, padding=1), weight),
            "folded": (lambda x: up_conv2d(x, wide, bias), wide),
            "rearranged": (lambda x: F.pixel_shuffle(F.conv2d(x, narrow, four, padding=1), 2)[..., 1:-1, 1:-1], narrow),
        }
    narrow = F.pixel_unshuffle(wide.detach(), 2).contiguous(memory_format=layout).requires_grad_()
    return {
        "plain": (lambda x: F.avg_pool2d(F.conv2d(x, weight, bias, padding=1), 2), weight),
        "folded": (lambda x: conv2d_down(x, wide, bias), wide),
        "rearranged": (lambda x: F.conv2d(F.pixel_unshuffle(F.pad(x, (1, 1, 1, 1)), 2), narrow, bias), narrow),
    }


def measure(direction: Direction, shape: tuple[int, int, int], batch: int, rounds: int) -> dict[str, list[float]]:
    """Return by form the median milliseconds of forward, input gradient and weight gradient.

    Raises RuntimeError where a form has another result than "plain".
    """
    channels, out_channels, side = shape
    x = torch.randn(batch, channels, side, side).contiguous(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(out_channels, channels, 3, 3) / (9 * channels) ** 0.5
    made = forms(direction, weight.contiguous(memory_format=torch.channels_last), torch.randn(out_channels))
    expected = made["plain"][0](x).detach()
    cotangent = torch.randn_like(expected)
    times: dict[str, list[list[float]]] = {name: [] for name in made}
    for turn in range(rounds + 1):
        for name, (run, weights) in made.items():
            stamps = [time.process_time()]
            out = run(x)
            stamps.append(time.process_time())
            for wanted in (x, weights):
                torch.autograd.grad(out, wanted, cotangent, retain_graph=True)
                stamps.append(time.process_time())
            if turn == 0 and not torch.allclose(out, expected, rtol=1e-4, atol=1e-4):
                raise RuntimeError(f"{direction} {shape}: the form {name} has another result")
            if turn:
                times[name].append([(b - a) * 1e3 for a, b in zip(stamps, stamps[1:], strict=False)])
    return {name: [statistics.median(column) for column in zip(*rows, strict=True)] for name, rows in times.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_resized_conv", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    for key, value in (("batch", 16), ("rounds", 3), ("threads", 1), ("narrower", 1)):
        parser.add_argument(f"--{key}", type=int, default=value)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    rows = []
    for direction, shapes in SHAPES.items():
        for channels, out_channels, side in shapes:
            shape = channels // options.narrower, out_channels // options.narrower, side
            found = measure(direction, shape, options.batch, options.rounds)
            for name, parts in found.items():
                ratio = sum(found["plain"]) / sum(parts)
                rows.append([direction, f"{shape[0]} -> {shape[1]} at {side}", name, *parts, f"{ratio:.2f}"])
    print(table("resizing | channels, side | form | forward ms | input ms | weights ms | plain / this", rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
