"""The processes of a run: rank, size and device, and the operations that all processes do together.

Every process holds both networks whole and takes its share of each batch. training/parallel.py averages the gradients,
with DistributedDataParallel. Device tensors travel by NCCL (Gloo on the CPU), everything else by Gloo, so that a word
between the processes never waits for the GPU.
"""

import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from sagan_fast.choices import Device
from sagan_fast.errors import InputError

T = TypeVar("T")
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_")


def environment_of_one() -> dict[str, str]:
    """Return the environment for a process that is not one of torchrun's."""
    return {key: value for key, value in os.environ.items() if not key.startswith(_TORCHRUN)}


def pick_device(name: Device) -> torch.device:
    """Return the device `name`; "auto" is cuda if available, else cpu. InputError if the device does not exist."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("device cuda was asked for, but PyTorch finds no CUDA device here")
    if name == "mps" and not torch.backends.mps.is_available():
        raise InputError("device mps was asked for, but PyTorch finds no Apple GPU here (macOS with Apple silicon)")
    return torch.device(name)


@dataclass(frozen=True)
class World:
    """This process: its rank, the number of processes, and its device. All processes must call each method together."""

    device: torch.device
    rank: int = 0
    size: int = 1
    control: Any = None
    """the group that objects travel by"""

    @property
    def is_main(self) -> bool:
        """Whether this is the one process that writes files and prints."""
        return self.rank == 0

    def average(self, tensors: Sequence[Tensor]) -> Callable[[], None]:
        """Begin to average float32 `tensors` over all processes, in place; call the result before they are used."""
        if self.size == 1 or not tensors:
            return lambda: None
        flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors]).div_(self.size)
        work = dist.all_reduce(flat, async_op=True)

        def finish() -> None:
            work.wait()  # of a GPU's queue, not of this process
            parts = torch.split(flat, [tensor.numel() for tensor in tensors])
            with torch.no_grad():
                torch._foreach_copy_(list(tensors), [p.view(t.shape) for p, t in zip(parts, tensors, strict=True)])

        return finish

    def gather_tensors(self, tensor: Tensor) -> list[Tensor]:
        """Return the `tensor` of every process, by rank; all must be on the device and of one shape and dtype."""
        if self.size == 1:
            return [tensor]
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor)
        return parts

    def gather(self, content: T) -> list[T]:
        """Return the `content` of every process, any object that can be pickled, by rank."""
        if self.size == 1:
            return [content]
        parts: list[Any] = [None] * self.size
        dist.all_gather_object(parts, content, group=self.control)
        return parts

    def share(self, content: T) -> T:
        """Return what the main process gave as `content`, any object that can be pickled."""
        if self.size == 1:
            return content
        box = [content if self.is_main else None]
        dist.broadcast_object_list(box, 0, group=self.control)
        return box[0]  # type: ignore[return-value]

    def agrees(self, numbers: Sequence[int]) -> bool:
        """Return whether all processes hold the same `numbers`."""
        return len({tuple(each) for each in self.gather(numbers)}) == 1

    def together(self, work: Callable[[], T]) -> T:
        """Return what `work` gives here, once it has succeeded in every process.

        Where it raises InputError in one, all end: the main process raises it and says where it happened; the others
        exit silently with the same status.
        """
        if self.size == 1:
            return work()
        result, sentence = _tried(work)
        sentences = self.gather(sentence)
        if any(sentences):
            first = next(i for i, text in enumerate(sentences) if text)
            if not self.is_main:
                raise SystemExit(2)
            raise InputError(sentences[first] + (f" (process {first} of {self.size})" if first else ""))
        return result  # type: ignore[return-value]

    def by_main(self, work: Callable[[], T]) -> T | None:
        """Return what `work` gives in the main process, None in others; an InputError there ends all of them."""
        return self.together(lambda: work() if self.is_main else None)

    def from_main(self, work: Callable[[], T]) -> T:
        """Return in every process what `work` gives in the main one; its InputError is raised in all of them."""
        if self.size == 1:
            return work()
        result, sentence = self.share(_tried(work) if self.is_main else (None, ""))
        if sentence:
            raise InputError(sentence)
        return result  # type: ignore[return-value]


def _tried(work: Callable[[], T]) -> tuple[T | None, str]:
    try:
        return work(), ""
    except InputError as error:
        return None, str(error) or "an input error"


_joined: list[World] = []


def current_world(device: torch.device) -> World:
    """Return the world of `connected`, else that of PyTorch's process group, else of this process alone on `device`."""
    if _joined:
        return _joined[-1]
    if dist.is_available() and dist.is_initialized():
        return World(device, dist.get_rank(), dist.get_world_size())
    return World(device)


@contextmanager
def connected(device: Device, timeout: int) -> Iterator[World]:
    """Yield the world that torchrun's environment describes, and leave it in the end; alone without torchrun.

    Each process of a machine takes the CUDA device of its local rank. `timeout` is the seconds after which a process
    that does not answer is given up. Raises InputError if there are fewer devices than processes, ConnectionError where
    another process is lost.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    here = pick_device(device)
    if size == 1:
        yield World(here)
        return
    if here.type == "mps":
        raise InputError(f"device mps runs one process only, and torchrun started {size}: leave out torchrun")
    rank, local_rank = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
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
        _joined.append(World(here, rank, size, dist.new_group(backend="gloo", timeout=wait)))
        try:
            yield _joined[-1]
        except BaseException:
            if here.type != "cuda":  # NCCL would wait for processes that may be in another collective
                dist.destroy_process_group()
            raise
        finally:
            _joined.pop()
        dist.destroy_process_group()


def _fresh_store(rank: int, size: int, wait: timedelta) -> Any:
    """Return the store that torchrun's environment names, under a prefix that only this start of the run has.

    torchrun keeps one store over its restarts, with the addresses of dead processes, and PyTorch's `env://` uses it as
    it is: `init_process_group` hangs after a restart (tried with PyTorch 2.14.1; a user can prevent it with
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, since each restart then has a store of its own). The number of restarts is no
    prefix, since it differs between machines. So each process writes a hello with a unique name. The first process,
    which may also read the hello of a dead one, answers every name it reads.
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
            f"this run of {size} processes lost one of them, or the connection to it ({text[:160]}): read what it "
            "printed, then continue from the last checkpoint with --resume"
        ) from error
