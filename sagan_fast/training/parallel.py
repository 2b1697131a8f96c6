"""A network that several processes train: PyTorch's DistributedDataParallel, set up for the steps of a GAN."""

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from sagan_fast.choices import GradientCompression
from sagan_fast.distributed import World
from sagan_fast.models.generator import in_eval_mode

Hook = Callable[[Any, Any], Future[Tensor]]
HOOKS: dict[GradientCompression, Hook] = {
    "none": default_hooks.allreduce_hook,
    "bf16": default_hooks.bf16_compress_hook,
}


class Replica:
    """A network as a step trains it: beside those of other processes in DistributedDataParallel, alone as it is.

    Call it instead of `network` for the forwards whose backward ends at its parameters, and `finish` before their
    gradients are used: means over all processes. Gradients with respect to something else, as R1's, or of a frozen
    network, are this process' alone.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.parallel: DistributedDataParallel | None = None
        self.buckets: list[int] = []
        """bytes of each bucket, in the order in which they were last sent"""
        self._travelling: list[Future[Tensor]] = []

    def connect(
        self,
        world: World,
        bucket_cap_mb: float,
        compression: GradientCompression,
        autocast: AbstractContextManager[None],
        *inputs: Any,
    ) -> None:
        """Average gradients over the processes of `world` from now on, in buckets of `bucket_cap_mb` MiB.

        `inputs` are those of a forward under `autocast`, which shows the order in which gradients become ready. Raises
        RuntimeError if a parameter gets none: DistributedDataParallel would wait for it.
        """
        if world.size == 1:
            return
        # u and v are the same everywhere by themselves. Running averages become means of all processes', not those of
        # the first. PyTorch 2.14 has a new name for it.
        known = inspect.signature(DistributedDataParallel).parameters
        buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        no_broadcast: dict[str, Any] = {buffers: False}
        self.parallel = DistributedDataParallel(
            self.network,
            bucket_cap_mb=bucket_cap_mb,
            gradient_as_bucket_view=True,  # no second copy; what arrives late arrives in the gradient itself
            # Every parameter gets a gradient in every step. The alternatives cost a walk through the graph each step,
            # or, as `static_graph`, end the first reduction after the first backward of any kind, which may be R1's.
            find_unused_parameters=False,
            static_graph=False,
            **no_broadcast,
            init_sync=False,  # the run compares the weights, and says so where they differ
        )
        self.parallel.register_comm_hook(HOOKS[compression], self._send)
        self._settle(autocast, inputs)

    def _send(self, hook: Hook, bucket: dist.GradBucket) -> Future[Tensor]:  # type: ignore[name-defined]
        """Begin `hook` on a bucket, and let the backward end without it: the next forward need not wait."""
        if bucket.index() == 0:
            self.buckets = []
        self.buckets.append(bucket.buffer().nbytes)
        self._travelling.append(hook(dist.group.WORLD, bucket))
        here: Future[Tensor] = Future()
        here.set_result(bucket.buffer())
        return here

    def _settle(self, autocast: AbstractContextManager[None], inputs: tuple[Any, ...]) -> None:
        """Let the group of spectral norms, then DistributedDataParallel, see the order of the gradients.

        Both divide their buckets anew after it. Sums over three and more processes are rounded by a gradient's place in
        its bucket, so a resumed run must begin with the buckets of one that went on.
        """
        for forward in (self.network, self, self):
            with in_eval_mode(self.network):
                with autocast:
                    out = forward(*inputs)
                out.sum().backward()
            self.finish()
            missing = [name for name, p in self.network.named_parameters() if p.requires_grad and p.grad is None]
            if missing:
                raise RuntimeError(f"several processes: every parameter must get a gradient, got none for {missing}")
            self.network.zero_grad(set_to_none=True)

    def __call__(self, *inputs: Any) -> Tensor:
        """Return the network's output for `inputs`."""
        out: Tensor = (self.parallel or self.network)(*inputs)
        return out

    def accumulating(self, part: int, parts: int) -> AbstractContextManager[None]:
        """Return the context of the forward of micro-batch `part` of `parts`: gradients travel with the last."""
        return nullcontext() if self.parallel is None or part == parts - 1 else self.parallel.no_sync()

    def finish(self) -> None:
        """Wait until the gradients are means over all processes; on CUDA the queue waits, not this process."""
        for travelling in self._travelling:
            travelling.wait()
        self._travelling.clear()
