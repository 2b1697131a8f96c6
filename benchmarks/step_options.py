"""One training step on the CPU, an option at a time, beside a network like BigGAN-PyTorch's, in one run.

    python -m benchmarks.bench_train_step --device cpu                    # minutes; --help shows the options

A step is one update of D and one of G: feat64 at 128x128, 32 base channels, 100 classes. The variants take turns and
the processor time of a step counts. The stand-in of bench_interop has the layers, shapes and order of work of
BigGAN-PyTorch's SAGAN script, written from its description. All start from the same weights and must give the same
losses. Each has a process of its own, whose peak of memory counts. Operator calls are those that reach PyTorch's
dispatcher and are no views; an op of ours counts once.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import bench_interop
from benchmarks.records import Record, append
from benchmarks.text import table
from sagan_fast.layers.conditional_batch_norm import ConditionalBatchNorm2d
from sagan_fast.layers.residual_blocks import DiscriminatorBlock, GeneratorBlock
from sagan_fast.layers.self_attention import SelfAttention2d
from sagan_fast.models.generator import Generator
from sagan_fast.training.config import TrainConfig
from sagan_fast.training.losses import discriminator_hinge, generator_hinge
from sagan_fast.training.memory import kept_memory
from sagan_fast.training.state import TrainState, new_state
from sagan_fast.training.step import Noise, prepare_batch, train_step

_PLAIN = {
    "resizing": "plain", "in_place": False, "backend": "eager", "products": False, "remakes": False,
    "keeps_pooled": True,
}  # fmt: skip
_FOLDED = {**_PLAIN, "resizing": "auto"}
_IN_PLACE = {**_FOLDED, "in_place": True}
_NORM = {**_IN_PLACE, "backend": "auto"}
_PRODUCTS = {**_NORM, "products": True}
_ALL = {**_PRODUCTS, "remakes": True, "keeps_pooled": False}
OPTIONS: dict[str, dict[str, Any]] = {
    "not folded": _PLAIN,
    "folded": _FOLDED,
    "folded, in place": _IN_PLACE,
    "folded, in place, batch norm and ReLU as one": _NORM,
    "all that, convolutions as products": _PRODUCTS,
    "all that, maps computed again in backward": _ALL,
    "all that, memory kept": _ALL,
}
"""Attributes of the generator, its batch norms and all residual blocks; each row adds to the row above.

The last is what the trainer does.
"""
KEPT = "all that, memory kept"
PEER = "like BigGAN-PyTorch"
Step = Callable[[], list[float]]


def config_of(options: argparse.Namespace, batch: int) -> TrainConfig:
    """Return the configuration of all our variants."""
    narrow = {"base_channels": options.channels}
    return TrainConfig.from_preset(
        "official-128-feat64", data="shapes", out="-", batch_size=batch, device="cpu", num_classes=options.classes,
        generator=narrow, discriminator=narrow,
    )  # fmt: skip


def step_of(name: str, options: argparse.Namespace, batch: int) -> Step:
    """Return the function that does a step of the variant `name` and returns both losses."""
    config = config_of(options, batch)
    state = started(config)
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(256, (batch, 3, 128, 128), generator=rng, dtype=torch.uint8)
    labels = torch.randint(options.classes, (batch,), generator=rng)
    if name == PEER:
        return peer_step(state, config, images, labels)
    for module in (*state.generator.modules(), *state.discriminator.modules()):
        if isinstance(module, (Generator, GeneratorBlock, DiscriminatorBlock, ConditionalBatchNorm2d)):
            for key, value in OPTIONS[name].items():
                if hasattr(module, key):
                    setattr(module, key, value)

    def step() -> list[float]:
        values = train_step(state, config, images, labels, torch.device("cpu"))
        return [float(values["d_loss"]), float(values["g_loss"])]

    return step


def started(config: TrainConfig) -> TrainState:
    """Return the state before the first step, every gamma 0.5, u and v converged.

    The stand-in moves them at each forward, ours once a step: only where they stand still are the losses the same.
    """
    state = new_state(config, torch.device("cpu"))
    set_gammas(state.generator, state.discriminator)
    for _ in range(10):
        state.g_spectral.step(), state.d_spectral.step()
    return state


def set_gammas(*models: nn.Module) -> None:
    """Set every gamma to 0.5: at 0 an attention block would have no gradient to compute."""
    for module in nn.ModuleList(models).modules():
        if isinstance(module, SelfAttention2d):
            nn.init.constant_(module.gamma, 0.5)


def peer_step(state: TrainState, config: TrainConfig, images: Tensor, labels: Tensor) -> Step:
    """Return a step of the stand-in from the weights of `state`, on the same images, noise and labels as ours."""
    size = (config.generator.base_channels, config.resolution, config.num_classes)
    G, D = bench_interop.Generator(*size), bench_interop.Discriminator(*size)
    take_weights(G, state.generator), take_weights(D, state.discriminator)
    g_adam, d_adam = (
        torch.optim.Adam(net.parameters(), lr, (config.beta1, config.beta2))
        for net, lr in ((G, config.g_lr), (D, config.d_lr))
    )
    average = [p.detach().clone() for p in G.parameters()]
    count = 0

    def step() -> list[float]:
        nonlocal count
        noise = Noise(config, count, torch.device("cpu"))
        real, y_real = prepare_batch(images, labels, noise)
        y, z = noise.classes(), noise.latent()
        d_adam.zero_grad()
        with torch.no_grad():
            fake = G(z, y)
        on_real, on_fake = D(torch.cat([real, fake]), torch.cat([y_real, y])).squeeze(1).chunk(2)
        d_loss = discriminator_hinge(on_real, on_fake)
        d_loss.backward()
        d_adam.step()
        y, z = noise.classes(), noise.latent()
        g_adam.zero_grad()
        D.requires_grad_(False)
        g_loss = generator_hinge(D(G(z, y), y).squeeze(1))
        g_loss.backward()
        D.requires_grad_(True)
        g_adam.step()
        with torch.no_grad():
            for mean, p in zip(average, G.parameters(), strict=True):
                mean.lerp_(p, 1e-4)
        count += 1
        return [float(d_loss.detach()), float(g_loss.detach())]

    return step


@torch.no_grad()
def take_weights(stand_in: nn.Module, ours: nn.Module) -> None:
    """Give the stand-in the weights of our network: both hold their layers in the order of the forward."""

    def layers(network: nn.Module) -> dict[type, list[Any]]:
        kinds = (nn.Conv2d, nn.Linear, nn.Embedding)
        found: dict[type, list[Any]] = {kind: [] for kind in kinds}
        for module in in_order(network):
            for kind in kinds:
                if isinstance(module, kind):
                    found[kind].append(module)
        return found

    theirs, own = layers(stand_in), layers(ours)
    for kind in theirs:
        for to, source in zip(theirs[kind], own[kind], strict=True):
            if hasattr(source, "parametrizations"):
                to.weight.copy_(source.parametrizations.weight.original)
                to.u0.copy_(source.parametrizations.weight[0]._u[None])
            else:  # a table of gains, which are added to 1 there, or of biases
                to.weight.copy_(source.weight - 1 if bool((source.weight == 1).all()) else source.weight)
            if getattr(to, "bias", None) is not None:
                to.bias.copy_(source.bias)
    for module in stand_in.modules():
        if isinstance(module, bench_interop.Attention):
            module.gamma.fill_(0.5)


def in_order(network: nn.Module) -> list[nn.Module]:
    """Return the modules in the order of the forward: our networks list the attention blocks after the others."""
    found: list[nn.Module] = []
    for name, child in network.named_children():
        if name == "attentions":
            continue
        if name == "blocks" and hasattr(network, "attentions"):
            for block, size in zip(child, network.config.sizes, strict=True):
                found += block.modules()
                if str(size) in network.attentions and network.attentions[str(size)] not in found:
                    found += network.attentions[str(size)].modules()
        else:
            found += child.modules()
    return found


class Calls(TorchDispatchMode):
    """Counts the operator calls that reach PyTorch's dispatcher and are no views."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not getattr(func, "is_view", False)
        return func(*args, **(kwargs or {}))


def calls_of(name: str, options: argparse.Namespace) -> int:
    """Return the operator calls of the second step, at a narrow width: they do not depend on it."""
    narrow = argparse.Namespace(channels=8, classes=options.classes)
    step = step_of(name, narrow, 4)
    step()
    with Calls() as calls:
        step()
    return calls.count


class Worker:
    """A process that does a step of one variant whenever it is told to."""

    def __init__(self, name: str, batch: int, options: argparse.Namespace) -> None:
        sizes = [f"--{key}={getattr(options, key)}" for key in ("channels", "classes", "threads")]
        command = [sys.executable, "-m", "benchmarks.bench_train_step", *sizes, "--only", name, "--batch", str(batch)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def step(self) -> dict[str, Any]:
        """Return "losses", the "seconds" of processor time of one step, and the "peak" of memory so far in bytes."""
        assert self.process.stdin and self.process.stdout
        print("step", file=self.process.stdin, flush=True)
        if not (line := self.process.stdout.readline()):
            raise RuntimeError(f"the process ended with status {self.process.wait()}")
        found: dict[str, Any] = json.loads(line)
        return found

    def end(self) -> None:
        """End the process."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def serve(name: str, batch: int, options: argparse.Namespace) -> None:
    """Do a step for every line on stdin, as the process of a `Worker`."""
    with kept_memory("cpu" if name == KEPT else ""):
        step = step_of(name, options, batch)
        for _ in sys.stdin:
            start = time.process_time()
            losses = step()
            seconds = time.process_time() - start
            # not getrusage: a new process starts with the peak of the one that made it
            status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
            peak = int(status["VmHWM"].split()[0]) * 1024
            print(json.dumps({"losses": losses, "seconds": seconds, "peak": peak}), flush=True)


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark, print its table and record it."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_train_step", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    about = "a GPU's steps are a part of `python -m benchmarks.run`"
    parser.add_argument("--device", choices=("cpu",), default="cpu", help=f"cpu; {about}")
    for key, value in (("channels", 32), ("classes", 100), ("rounds", 3), ("threads", 1)):
        parser.add_argument(f"--{key}", type=int, default=value)
    parser.add_argument("--batch", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--out", type=Path, help="folder to append records to, such as benchmarks/results")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    if options.only:
        serve(options.only, options.batch[0], options)
        return 0
    for batch in options.batch:
        records = measure(options, batch)
        print(describe(records), flush=True)
        for record in records if options.out else ():
            append(record, "cpu", options.out)
    return 0


def measure(options: argparse.Namespace, batch: int, make: Callable[..., Any] = Worker) -> list[Record]:
    """Return a record for each variant at one batch size; raises RuntimeError where losses differ."""
    workers = {name: make(name, batch, options) for name in (PEER, *OPTIONS)}
    try:
        losses = {name: worker.step()["losses"] for name, worker in workers.items()}  # before anything is timed
        expected = losses["not folded"]
        worst = {
            name: max(abs(a - b) / max(1, abs(b)) for a, b in zip(values, expected, strict=True))
            for name, values in losses.items()
        }
        for name, error in worst.items():
            # the stand-in moves u and v at each forward, and Adam makes whole steps of rounding noise
            if not error < (1e-2 if name == PEER else 2e-3):
                raise RuntimeError(f"{name}: losses {losses[name]} are not {expected}")
        rounds = [{name: worker.step() for name, worker in workers.items()} for _ in range(options.rounds)]
    finally:
        for worker in workers.values():
            worker.end()
    records = []
    for name in workers:
        seconds, base, peer = ([turn[who]["seconds"] for turn in rounds] for who in (name, "not folded", PEER))
        low, middle, high = torch.tensor(seconds).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
        ratios = {
            "of_not_folded": statistics.median(a / b for a, b in zip(seconds, base, strict=True)),
            "peer_over_this": statistics.median(a / b for a, b in zip(peer, seconds, strict=True)),
        }
        records.append(Record(
            "step_options", f"feat64-128-ch{options.channels}-batch{batch}", "fp32", "forward+backward", name, "cpu",
            p20_us=low * 1e6, p50_us=middle * 1e6, p80_us=high * 1e6, samples=len(rounds), relative_rms=worst[name],
            peak_bytes=max(turn[name]["peak"] for turn in rounds),
            config={"batch_size": batch, "threads": options.threads, "calls": calls_of(name, options), **ratios},
        ))  # fmt: skip
    return records


COLUMNS = "variant | s a step | of not folded | BigGAN-like / this | peak GiB | of not folded | operator calls | loss"


def describe(records: list[Record], markdown: bool = False) -> str:
    """Return the records of one batch size as a table."""
    return f"{records[0].shape}\n{options_table([asdict(record) for record in records], markdown)}\n"


def options_table(records: list[dict[str, Any]], markdown: bool = True) -> str:
    """Return the records of one batch size, as `records.read` gives them, as a table: those of today's variants."""
    of = {r["provider"]: r for r in records}
    base, rows = of["not folded"], []
    for r in (of[name] for name in (PEER, *OPTIONS) if name in of):
        c, peak, of_peak = r["config"], r["peak_bytes"] / 2**30, r["peak_bytes"] / base["peak_bytes"]
        time_s = f"{r['p50_us'] / 1e6:.2f}"
        rows.append([
            r["provider"], time_s, c["of_not_folded"], c["peer_over_this"], peak, of_peak, c["calls"],
            f"{r['relative_rms']:.0e}",
        ])  # fmt: skip
    return table(COLUMNS, rows, markdown)
