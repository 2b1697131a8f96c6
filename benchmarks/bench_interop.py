"""Measures a BigGAN-PyTorch-like GAN as it is and after `sagan_fast.accelerate`, in one run on the CPU.

    python -m benchmarks.bench_interop                   # minutes; --help shows the options

A step is one update of D (real and generated images in one forward) and one of G. The variants take turns, and the
processor time of a step counts, so that the load of the machine matters little. The median over the rounds is printed.
Each variant's peak memory is measured in a process of its own. The networks are stand-ins with the layers, shapes and
order of work of BigGAN-PyTorch's SAGAN script.
"""

import argparse
import copy
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sagan_fast

PARTS = ("attention", "spectral_norm", "batch_norm")
VARIANTS = {
    "theirs": None,
    **{part.replace("_", " "): {other: other == part for other in PARTS} for part in PARTS},
    "all": {},
}


class _Normed:
    """Spectral norm as BigGAN-PyTorch's layers have it: `W_` returns W/sigma and moves u0 in training."""

    def keep(self, rows: int) -> None:
        self.register_buffer("u0", torch.randn(1, rows))
        self.register_buffer("sv0", torch.ones(1))

    def W_(self) -> Tensor:  # noqa: N802
        matrix = self.weight.view(self.weight.size(0), -1)
        with torch.no_grad():
            v = F.normalize(torch.matmul(self.u0, matrix))
            u = F.normalize(torch.matmul(v, matrix.t()))
            if self.training:
                self.u0[:] = u
        sigma = torch.squeeze(torch.matmul(torch.matmul(v, matrix.t()), u.t()))
        if self.training:
            with torch.no_grad():
                self.sv0[:] = sigma
        return self.weight / sigma


class Conv(nn.Conv2d, _Normed):
    def __init__(self, inputs: int, outputs: int, kernel: int = 3, bias: bool = True) -> None:
        super().__init__(inputs, outputs, kernel, padding=kernel // 2, bias=bias)
        self.keep(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.W_(), self.bias, 1, self.padding)


class Linear(nn.Linear, _Normed):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.keep(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.W_(), self.bias)


class Embedding(nn.Embedding, _Normed):
    def __init__(self, count: int, width: int) -> None:
        super().__init__(count, width)
        self.keep(count)

    def forward(self, y: Tensor) -> Tensor:
        return F.embedding(y, self.W_())


class Attention(nn.Module):
    def __init__(self, C: int) -> None:
        super().__init__()
        self.theta, self.phi = Conv(C, C // 8, 1, False), Conv(C, C // 8, 1, False)
        self.g, self.o = Conv(C, C // 2, 1, False), Conv(C // 2, C, 1, False)
        self.gamma = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        q, k, v = (
            self.theta(x).flatten(2),
            F.max_pool2d(self.phi(x), 2).flatten(2),
            F.max_pool2d(self.g(x), 2).flatten(2),
        )
        beta = F.softmax(torch.bmm(q.transpose(1, 2), k), -1)
        return self.gamma * self.o(torch.bmm(v, beta.transpose(1, 2)).view(x.shape[0], -1, *x.shape[2:])) + x


class Norm(nn.Module):
    def __init__(self, C: int, classes: int) -> None:
        super().__init__()
        self.gain, self.bias = nn.Embedding(classes, C), nn.Embedding(classes, C)
        self.register_buffer("stored_mean", torch.zeros(C))
        self.register_buffer("stored_var", torch.ones(C))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        out = F.batch_norm(x, self.stored_mean, self.stored_var, None, None, self.training, 0.1)
        return out * (1 + self.gain(y))[:, :, None, None] + self.bias(y)[:, :, None, None]


class GBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, classes: int) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv_sc = Conv(inputs, outputs), Conv(outputs, outputs), Conv(inputs, outputs, 1)
        self.bn1, self.bn2 = Norm(inputs, classes), Norm(outputs, classes)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.conv1(F.interpolate(F.relu(self.bn1(x, y)), scale_factor=2))
        return self.conv2(F.relu(self.bn2(h, y))) + self.conv_sc(F.interpolate(x, scale_factor=2))


class DBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, down: bool) -> None:
        super().__init__()
        self.conv1, self.conv2, self.down, self.first = Conv(inputs, outputs), Conv(outputs, outputs), down, inputs == 3
        if down:
            self.conv_sc = Conv(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(F.relu(self.conv1(x if self.first else F.relu(x))))
        return F.avg_pool2d(h, 2) + F.avg_pool2d(self.conv_sc(x), 2) if self.down else h + x


class Generator(nn.Module):
    def __init__(self, channels: int, size: int, classes: int) -> None:
        super().__init__()
        count = size.bit_length() - 3
        widths = [channels * factor for factor in (16, 16, 8, 4, 2, 1)[5 - count :]]
        self.linear, self.blocks = Linear(128, widths[0] * 16), nn.ModuleList()
        for i, (inputs, outputs) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
            attention = [Attention(outputs)] if 8 << i == size // 2 else []
            self.blocks.append(nn.ModuleList([GBlock(inputs, outputs, classes), *attention]))
        self.bn, self.last = nn.BatchNorm2d(widths[-1]), Conv(widths[-1], 3)

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        h = self.linear(z).view(len(z), -1, 4, 4)
        for row in self.blocks:
            for block in row:
                h = block(h, y)
        return torch.tanh(self.last(F.relu(self.bn(h))))


class Discriminator(nn.Module):
    def __init__(self, channels: int, size: int, classes: int) -> None:
        super().__init__()
        count = size.bit_length() - 3
        widths = [3, *(channels * factor for factor in (1, 2, 4, 8, 16)[:count])]
        rows = [[DBlock(i, o, True)] for i, o in zip(widths[:-1], widths[1:], strict=True)]
        rows[0].append(Attention(widths[1]))
        self.blocks = nn.ModuleList(nn.ModuleList(row) for row in [*rows, [DBlock(widths[-1], widths[-1], False)]])
        self.linear, self.embed = Linear(widths[-1], 1), Embedding(classes, widths[-1])

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for row in self.blocks:
            for block in row:
                x = block(x)
        h = F.relu(x).sum((2, 3))
        return self.linear(h) + (self.embed(y) * h).sum(1, keepdim=True)


def steps(options: argparse.Namespace) -> dict[str, Callable[[], float]]:
    """Return a function for each variant that does one step and returns D's loss; all start from the same weights."""
    torch.manual_seed(0)
    networks = [kind(options.channels, options.size, options.classes) for kind in (Generator, Discriminator)]
    made = {}
    for name in [options.only] if options.only else VARIANTS:
        G, D = copy.deepcopy(networks)
        optimizers = [torch.optim.Adam(net.parameters(), lr, (0.0, 0.999)) for net, lr in ((G, 1e-4), (D, 4e-4))]
        if (how := VARIANTS[name]) is not None:
            for net in (G, D):
                sagan_fast.accelerate(net, strict=True, **how)
        made[name] = step_of(G, D, optimizers, options, torch.Generator().manual_seed(1))
    return made


def step_of(
    G: nn.Module,
    D: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    options: argparse.Namespace,
    rng: torch.Generator,
) -> Callable[[], float]:  # fmt: skip
    """Return the function that trains `D`, then `G`, once, on images and noise of its own random numbers."""
    B, size = options.batch, options.size

    def step() -> float:
        z, images = torch.randn(2 * B, 128, generator=rng), torch.rand(B, 3, size, size, generator=rng) * 2 - 1
        y = torch.randint(options.classes, (B,), generator=rng)
        for optimizer in optimizers:
            optimizer.zero_grad()
        with torch.no_grad():
            fake = G(z[:B], y)
        on_fake, on_real = D(torch.cat([fake, images]), torch.cat([y, y])).split(B)
        d_loss = F.relu(1 + on_fake).mean() + F.relu(1 - on_real).mean()
        d_loss.backward()
        optimizers[1].step()
        for optimizer in optimizers:
            optimizer.zero_grad()
        D.requires_grad_(False)
        (-D(G(z[B:], y), y).mean()).backward()
        D.requires_grad_(True)
        optimizers[0].step()
        return float(d_loss.detach())

    return step


def peak_mib(name: str, arguments: list[str]) -> float:
    """Return the peak of resident memory of a process that does two steps of the variant `name`, in MiB."""
    command = [sys.executable, "-m", "benchmarks.bench_interop", *arguments, "--only", name]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("channels", 32), ("size", 128), ("classes", 100), ("batch", 4), ("rounds", 5), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--no-memory", action="store_true", help="leave the processes that measure memory out")
    parser.add_argument("--json", help="file for the results")
    parser.add_argument("--only", choices=VARIANTS, help=argparse.SUPPRESS)
    arguments = sys.argv[1:] if argv is None else argv
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    made = steps(options)
    if options.only:
        for _ in range(2):
            made[options.only]()
        # not getrusage: a new process starts with the peak of the one that made it
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        print(int(status["VmHWM"].split()[0]) / 1024)
        return
    losses = {name: step() for name, step in made.items()}
    for name, loss in losses.items():  # before anything is timed
        assert abs(loss - losses["theirs"]) < 1e-3 * max(1.0, abs(losses["theirs"])), (name, losses)
    times: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(options.rounds):
        for name, step in made.items():
            start = time.process_time()
            step()
            times[name].append(time.process_time() - start)
    rows = []
    for name, measured in times.items():
        ratio = statistics.median(a / b for a, b in zip(times["theirs"], measured, strict=True))
        row = {"variant": name, "cpu_s": round(statistics.median(measured), 4), "theirs / this": round(ratio, 3)}
        rows.append(row if options.no_memory else {**row, "peak MiB": round(peak_mib(name, arguments), 1)})
    print(
        f"torch {torch.__version__}, {options.threads} thread(s), {options.size}x{options.size}, batch {options.batch}"
    )
    print("  ".join(f"{key:>14}" for key in rows[0]))
    for row in rows:
        print("  ".join(f"{value:>14}" for value in row.values()))
    if options.json:
        with open(options.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
