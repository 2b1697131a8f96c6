"""Measures what sending gradients in buckets saves: steps of several Gloo processes over links of their own.

    python -m benchmarks.bench_ddp                              # 2 and 4 processes; needs root on Linux, ip and tc
    python -m benchmarks.bench_ddp --processes 2 --mbit 400

Each process runs in a network namespace whose link to the others sends and receives at most --mbit megabits a second.
The namespaces are made and removed here. All processes share this machine's cores, so four on two cores compute at half
their speed. `one-all-reduce` has buckets that hold a whole network; each is sent when the backward pass has ended.
`compute` is a step that sends nothing, while the other processes compute theirs. The providers take turns; a step takes
as long as its slowest process.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch

from benchmarks.accuracy import rel_rms
from benchmarks.bench_train_step import real_batch, set_gammas
from benchmarks.records import LINKS, Record, append
from sagan_fast.distributed import World, connected
from sagan_fast.training.config import TrainConfig
from sagan_fast.training.state import TrainState, new_state
from sagan_fast.training.step import train_step

PROVIDERS = {
    "compute": {},
    "one-all-reduce": {"bucket_cap_mb": 1e4},
    "ours": {},
    "ours-bf16": {"gradient_compression": "bf16"},
}
"""Options of the run that each provider has."""


def link_commands(size: int, mbit: float, name: str) -> list[list[str]]:
    """Return the commands that make `size` namespaces NAME0, NAME1, ... on one bridge, with links of `mbit`."""
    limit = f"root tbf rate {mbit}mbit burst 128kb latency 500ms"
    lines = [f"ip link add {name} type bridge", f"ip link set {name} up"]
    for rank in range(size):
        here, there, space = f"{name}h{rank}", f"{name}n{rank}", f"{name}{rank}"
        lines += [
            f"ip netns add {space}",
            f"ip link add {here} type veth peer name {there}",
            f"ip link set {there} netns {space}",
            f"ip link set {here} master {name} up",
            f"ip netns exec {space} ip addr add 10.97.0.{rank + 1}/24 dev {there}",
            f"ip netns exec {space} ip link set {there} up",
            f"ip netns exec {space} ip link set lo up",
            f"tc qdisc add dev {here} {limit}",
            f"ip netns exec {space} tc qdisc add dev {there} {limit}",
        ]
    return [line.split() for line in lines]


@contextmanager
def links(size: int, mbit: float) -> Iterator[str]:
    """Yield the name of `size` namespaces and remove them in the end. Raises CalledProcessError where that fails."""
    name = f"sf{os.getpid() % 100000}"
    try:
        for command in link_commands(size, mbit, name):
            subprocess.run(command, check=True)
        yield name
    finally:
        for rank in range(size):  # which takes their links along
            subprocess.run(["ip", "netns", "del", f"{name}{rank}"], stderr=subprocess.DEVNULL)
        subprocess.run(["ip", "link", "del", name], stderr=subprocess.DEVNULL)


def weights(state: TrainState) -> torch.Tensor:
    """Return the discriminator's weights, flat."""
    return torch.cat([p.detach().flatten() for p in state.discriminator.parameters()])


def measure(options: dict[str, Any], world: World) -> dict[str, Any]:
    """Return the samples of each provider in microseconds, what they have in common, and how far results differ."""
    states: dict[str, tuple[TrainState, TrainConfig]] = {}
    for name, own in PROVIDERS.items():
        made = TrainConfig.from_preset(
            options["preset"], data="shapes", out="-", batch_size=options["images"] * world.size, device="cpu",
            **{"bucket_cap_mb": options["bucket_cap_mb"], **own}, **options["networks"],
        )  # fmt: skip
        state = new_state(made, world.device)
        set_gammas(state.generator, state.discriminator)
        if name == "compute":
            made = TrainConfig.from_dict({**made.to_dict(), "batch_size": options["images"]})
        else:
            state.connect(world, made)
        states[name] = state, made
    samples: dict[str, list[float]] = {name: [] for name in states}
    differs = 0.0
    for turn in range(options["rounds"] + 1):
        for name, (state, made) in states.items():
            mine = slice(state.world.rank, None, state.world.size)
            images, labels = (x[mine] for x in real_batch(made, "cpu"))
            world.gather(0)
            began = time.perf_counter()
            train_step(state, made, images, labels, world.device)
            took = max(world.gather(time.perf_counter() - began))
            if turn:
                samples[name].append(took * 1e6)
        if not turn:  # later Adam makes whole steps of rounding
            one, ours = (weights(states[name][0]) for name in ("one-all-reduce", "ours"))
            differs = rel_rms(ours, one)
    networks = states["ours"][0].generator, states["ours"][0].discriminator
    return {
        "samples": samples,
        "relative_rms": differs,
        "buckets": [len(replica.buckets) for replica in (states["ours"][0].g_replica, states["ours"][0].d_replica)],
        "megabytes": sum(p.numel() * 4 for network in networks for p in network.parameters()) / 1e6,
    }


def run_rank(options: dict[str, Any]) -> None:
    """Be one of the processes: measure, and let the first print the result."""
    with connected("cpu", 600) as world:
        result = measure(options, world)
        if world.is_main:
            print(json.dumps(result), flush=True)


def run_processes(size: int, mbit: float, options: dict[str, Any]) -> dict[str, Any]:
    """Return what `measure` gives for `size` processes over links of `mbit`."""
    command = [sys.executable, "-m", "benchmarks.bench_ddp", "--as-rank", json.dumps(options)]
    with links(size, mbit) as name:
        ranks = []
        for rank in range(size):
            environment = {
                **os.environ, "RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank),
                "MASTER_ADDR": "10.97.0.1", "MASTER_PORT": "29400", "GLOO_SOCKET_IFNAME": f"{name}n{rank}",
                "OMP_NUM_THREADS": "1",
            }  # fmt: skip
            there = ["ip", "netns", "exec", f"{name}{rank}", *command]
            ranks.append(subprocess.Popen(there, env=environment, stdout=subprocess.PIPE if rank == 0 else None))
        try:
            printed = ranks[0].communicate()[0]
            if any(process.wait() for process in ranks):
                raise RuntimeError("bench_ddp: a process failed; it printed why")
        finally:
            for process in ranks:
                process.kill()
    found: dict[str, Any] = json.loads(printed)
    return found


def records(size: int, mbit: float, options: dict[str, Any], found: dict[str, Any]) -> Iterator[Record]:
    """Yield a record for each provider."""
    for name, samples in found["samples"].items():
        p20, *_, p80 = quantiles(samples, n=5)
        config = {
            "processes": size, "mbit": mbit, "images": options["images"], "bucket_cap_mb": options["bucket_cap_mb"],
            "processors": os.cpu_count(), "buckets": found["buckets"], "megabytes": found["megabytes"],
        }  # fmt: skip
        yield Record(
            "ddp", f"{options['preset']}-{size}-processes", "fp32", "forward+backward", name, "wall", p20,
            quantiles(samples, n=2)[0], p80, len(samples), found["relative_rms"], config=config,
        )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and record; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_ddp", description="Steps over limited links.")
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4], help="numbers of processes")
    parser.add_argument("--mbit", type=float, default=300.0, help="rate of each link, each way, in megabits a second")
    parser.add_argument("--preset", default="tiny-imagenet-64", help="preset of the networks")
    parser.add_argument("--channels", type=int, default=32, help="base channels of both networks")
    parser.add_argument("--images", type=int, default=8, help="images a step and process")
    parser.add_argument("--bucket-cap-mb", type=float, default=1.0, help="MiB of a bucket; networks here are small")
    parser.add_argument("--rounds", type=int, default=8, help="steps of each provider")
    parser.add_argument("--results", type=Path, default=LINKS, help="folder of the records")
    parser.add_argument("--as-rank", help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.as_rank:
        run_rank(json.loads(given.as_rank))
        return 0
    narrow = {"base_channels": given.channels}
    options = {
        "preset": given.preset, "images": given.images, "bucket_cap_mb": given.bucket_cap_mb, "rounds": given.rounds,
        "networks": {"generator": narrow, "discriminator": narrow},
    }  # fmt: skip
    for size in given.processes:
        for record in records(size, given.mbit, options, run_processes(size, given.mbit, options)):
            print(f"{record.shape} {record.provider}: {(record.p50_us or 0) / 1e3:.0f} ms", flush=True)
            append(record, "cpu", given.results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
