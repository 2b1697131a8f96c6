"""The processes that train together, and the few things they tell each other.

Every process holds both networks whole and takes its share of each batch. Gradients are averaged by one all-reduce a
network and step, not by DistributedDataParallel: the fused spectral norm hands the gradients of a network over
together, at the end of its backward, so there is nothing that buckets could overlap with. Device tensors travel by NCCL
(Gloo on the CPU), everything else by Gloo, so that a word between the processes never waits for the GPU.
"""

from __future__ import annotations

import os
import socket
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from sagan_fast.errors import InputError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """Which of how many processes this is, and the device it trains on."""

    device: torch.device
    rank: int = 0
    size: int = 1
    control: Any = None
    """the group that host tensors travel by"""

    @property
    def is_main(self) -> bool:
        """Whether this is the one process that writes files and speaks."""
        return self.rank == 0

    def average(self, tensors: Sequence[Tensor]) -> Callable[[], None]:
        """Begin to average float32 `tensors` over all processes, in place; call the result before they are used."""
        if self.size == 1 or not tensors:
            return _nothing
        flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors]).div_(self.size)
        work = dist.all_reduce(flat, async_op=True)

        def finish() -> None:
            work.wait()  # of a GPU's queue, not of this process
            parts = torch.split(flat, [tensor.numel() for tensor in tensors])
            with torch.no_grad():
                torch._foreach_copy_(list(tensors), [p.view(t.shape) for p, t in zip(parts, tensors, strict=True)])

        return finish

    def total(self, values: Sequence[float]) -> list[float]:
        """Return the sums of `values` over all processes, in float64."""
        return self._reduced(values, torch.float64, dist.ReduceOp.SUM)

    def largest(self, values: Sequence[float]) -> list[float]:
        """Return the largest of each of `values` over all processes."""
        return self._reduced(values, torch.float64, dist.ReduceOp.MAX)

    def agrees(self, numbers: Sequence[int]) -> bool:
        """Return whether all processes hold the same `numbers`."""
        lowest = self._reduced(numbers, torch.int64, dist.ReduceOp.MIN)
        return lowest == self._reduced(numbers, torch.int64, dist.ReduceOp.MAX)

    def _reduced(self, values: Sequence[Any], dtype: torch.dtype, op: Any) -> list[Any]:
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=dtype)
        dist.all_reduce(tensor, op, group=self.control)
        found: list[Any] = tensor.tolist()
        return found

    def share(self, content: bytes | None) -> bytes | None:
        """Return what the main process gave as `content`, in every process."""
        if self.size == 1:
            return content
        length = torch.tensor([-1 if content is None or not self.is_main else len(content)])
        dist.broadcast(length, 0, group=self.control)
        if length.item() < 0:
            return None
        if self.is_main and content:
            data = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        else:
            data = torch.zeros(int(length.item()), dtype=torch.uint8)
        if len(data):
            dist.broadcast(data, 0, group=self.control)
        return content if self.is_main else data.numpy().tobytes()

    def gather(self, content: bytes) -> list[bytes]:
        """Return the `content` of every process, by rank, in every process."""
        if self.size == 1:
            return [content]
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(content)]), group=self.control)
        longest = max(int(length.item()) for length in lengths)
        padded = torch.frombuffer(bytearray(content.ljust(max(longest, 1), b"\0")), dtype=torch.uint8)
        parts = [torch.zeros_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded, group=self.control)
        return [p.numpy().tobytes()[: int(n.item())] for p, n in zip(parts, lengths, strict=True)]

    def together(self, work: Callable[[], T]) -> T:
        """Return what `work` gives here, once it has succeeded in every process.

        Where it raises InputError in one, all end: the main process raises it, saying where it happened, the others
        leave without a word and with the same exit status.
        """
        result, sentence = None, ""
        try:
            result = work()
        except InputError as error:
            sentence = str(error) or "an input error"
            if self.size == 1:
                raise
        sentences = [text.decode() for text in self.gather(sentence.encode())]
        if any(sentences):
            rank = next(rank for rank, text in enumerate(sentences) if text)
            if not self.is_main:
                raise SystemExit(2)
            raise InputError(sentences[rank] + (f" (process {rank} of {self.size})" if rank else ""))
        return result  # type: ignore[return-value]

    def by_main(self, work: Callable[[], T]) -> T | None:
        """Return what `work` gives in the main process, None in others; an InputError there ends all of them."""
        return self.together(lambda: work() if self.is_main else None)


class StopVote:
    """Lets all processes stop at the same step when one of them was told to.

    Each call hands in this process' wish and returns what was wished for at the call before: the answer travels while
    the step is computed, so that nothing waits for it. Alone, the wish is granted at once.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.pending: tuple[Any, Tensor] | None = None

    def __call__(self, wish: bool) -> bool:
        if self.world.size == 1:
            return wish
        granted = self.settle()
        flag = torch.tensor([int(wish)], dtype=torch.int32)
        self.pending = dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.world.control, async_op=True), flag
        return granted

    def settle(self) -> bool:
        """Wait for the answer under way, if there is one, and return it."""
        if self.pending is None:
            return False
        work, flag = self.pending
        self.pending = None
        work.wait()
        return bool(flag.item())


@contextmanager
def connected(device: str, timeout: int) -> Iterator[World]:
    """Yield the world that torchrun's environment describes, and leave it in the end; alone without torchrun.

    `device` is cpu, cuda or auto; each process of a machine takes the CUDA device of its local rank. `timeout` is the
    seconds after which a process that does not answer is given up. Raises InputError if there are fewer devices than
    processes, ConnectionError where another process is lost.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World(pick_device(device))
        return
    rank, local_rank = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    here = pick_device(device)
    options: dict[str, Any] = {}
    if here.type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise InputError(
                f"{socket.gethostname()} was given {os.environ.get('LOCAL_WORLD_SIZE', local_rank + 1)} processes but "
                f"has {torch.cuda.device_count()} CUDA devices: start torchrun with as many processes as devices"
            )
        here = torch.device("cuda", local_rank)
        torch.cuda.set_device(here)
        options["device_id"] = here
    with _losses_named(size):
        wait = timedelta(seconds=timeout)
        store = _fresh_store(rank, size, wait)
        backend = "nccl" if here.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=wait, **options)
        try:
            yield World(here, rank, size, dist.new_group(backend="gloo", timeout=wait))
        except BaseException:
            if here.type != "cuda":  # NCCL would wait for processes that may be in another collective
                dist.destroy_process_group()
            raise
        dist.destroy_process_group()


def _fresh_store(rank: int, size: int, wait: timedelta) -> Any:
    """Return the store that torchrun's environment names, under a prefix that only this start of the run has.

    After a restart torchrun hands out the same store again, and in it the addresses of processes that are dead, which
    Gloo would try to reach. Its count of restarts does not help: it is another one on each machine. So each process
    says hello under a name of its own until the first, who may have read the hello of a dead one, has answered it.
    """
    store, _, _ = next(dist.rendezvous("env://", timeout=wait))  # type: ignore[attr-defined]
    me = uuid.uuid4().hex
    deadline = time.monotonic() + wait.total_seconds()
    if rank:
        store.set(f"sagan_fast/hello/{rank}", me)
        store.wait([f"sagan_fast/answer/{me}"], wait)
        prefix = store.get(f"sagan_fast/answer/{me}").decode()
        store.set(f"{prefix}/here/{rank}", "")
        return dist.PrefixStore(prefix, store)  # type: ignore[attr-defined]
    prefix, answered = f"sagan_fast/{me}", set()
    missing = list(range(1, size))
    while missing:
        for other in missing:
            if store.check([f"sagan_fast/hello/{other}"]):
                name = store.get(f"sagan_fast/hello/{other}").decode()
                if name not in answered:
                    answered.add(name)
                    store.set(f"sagan_fast/answer/{name}", prefix)
        missing = [other for other in missing if not store.check([f"{prefix}/here/{other}"])]
        if time.monotonic() > deadline:
            raise ConnectionError(f"{len(missing)} of the {size} processes of this run did not come within {wait}")
        time.sleep(0.02 if missing else 0.0)
    return dist.PrefixStore(prefix, store)  # type: ignore[attr-defined]


@contextmanager
def _losses_named(size: int) -> Iterator[None]:
    try:
        yield
    except (dist.DistError, RuntimeError) as error:
        text = " ".join(str(error).split())
        lost = ("gloo", "Connection closed", "Connection reset", "NCCL", "Timed out", "timed out", "Socket", "socket")
        if not isinstance(error, dist.DistError) and not any(word in text for word in lost):
            raise
        raise ConnectionError(
            f"this run of {size} processes lost one of them or the way to it ({text[:160]}); what that process printed "
            "says why, and --resume goes on from the last checkpoint"
        ) from error


def pick_device(name: str) -> torch.device:
    """Return the device `name` stands for ("auto" is cuda where there is one); InputError if it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("device cuda was asked for, but PyTorch finds no CUDA device here")
    return torch.device(name)


@torch.no_grad()
def fingerprint(tensors: Iterable[Tensor]) -> list[int]:
    """Return two numbers that a change of any bit of the float32 or integer `tensors` changes; one transfer."""
    sums = []
    for index, tensor in enumerate(tensors):
        bits = tensor.view(torch.int32) if tensor.dtype == torch.float32 else tensor
        sums.append(bits.sum(dtype=torch.int64) * (2 * index + 1))
    if not sums:
        return [0, 0]
    found = torch.stack(sums)
    return [int(found.sum().item()), int((found * torch.arange(1, len(sums) + 1, device=found.device)).sum().item())]


def _nothing() -> None:
    return None
