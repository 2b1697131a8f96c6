"""Whole training steps as CUDA graphs: both updates, spectral norm, Adam and the averaged weights in one launch.

A graph computes at the addresses that it was captured with. So images, labels and noise are copied to one place before
each replay, and everything that a step hands to the next one stays where it is. Steps with and without gradient
penalties have a graph each. Source: https://pytorch.org/docs/stable/notes/cuda.html#cuda-graphs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sagan_fast.layers.spectral_norm_member import Link
from sagan_fast.training.config import TrainConfig
from sagan_fast.training.losses import penalty_weights
from sagan_fast.training.state import TrainState
from sagan_fast.training.step import Noise, ema_share, train_step, update_networks

PARAMETER_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")
WARM_UP = 3
"""Steps of a kind before it is captured: libraries choose algorithms, kernels are built, and Adam makes its moments."""

Values = dict[str, Tensor]


class Recorder(Protocol):
    """What records a step: `CudaRecorder`, or a stand-in of the tests."""

    def warming_up(self) -> AbstractContextManager[None]:
        """Return the context of the steps before a recording."""

    def record(self, function: Callable[[], Values]) -> tuple[Callable[[], None], Values]:
        """Return what does the work of `function` again, and the tensors that it writes then; nothing is done yet."""


class CudaRecorder:
    """Captures CUDA graphs on a stream of its own; all share one pool of memory, as they never run at the same time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream, self.pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()  # type: ignore[no-untyped-call]

    @contextmanager
    def warming_up(self) -> Iterator[None]:
        """Run on the stream of the captures: what autograd keeps of a step belongs to its stream."""
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            yield
        current.wait_stream(self.stream)

    def record(self, function: Callable[[], Values]) -> tuple[Callable[[], None], Values]:
        """Capture `function`. Other threads may go on, such as the one that pins the memory of images."""
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        try:
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                values = function()
        except Exception:
            # PyTorch's own end of a capture fails too then, before it has put back what it changed.
            torch.cuda.set_stream(current)
            with suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), self.pool)  # type: ignore[attr-defined]
            raise
        return graph.replay, values


class StaticNoise(Noise):
    """Noise that always lies at the same addresses: `refill` copies that of another step there."""

    def __init__(self, noise: Noise) -> None:
        self.config, self.device, self.world, self.parts = noise.config, noise.device, noise.world, noise.parts
        self.drawn: list[tuple[Any, Tensor]] = []
        self.refill(noise)

    def refill(self, noise: Noise) -> None:
        """Take over the numbers of `noise`, of which nothing was drawn yet, in the order of the first step."""
        self.source = noise
        for draw, place in self.drawn:
            place.copy_(noise.on_host(draw), non_blocking=True)
        self.places_left = iter([place for _, place in self.drawn])

    def _mine(self, draw: Callable[[int, torch.Generator], Tensor]) -> Tensor:
        if (place := next(self.places_left, None)) is not None:
            return place
        self.drawn.append((draw, super()._mine(draw)))
        return self.drawn[-1][1]

    def on_host(self, draw: Callable[[int, torch.Generator], Tensor]) -> Tensor:
        """Draw from the noise of this step."""
        return self.source.on_host(draw)


class _Kind:
    """Steps with the same gradient penalties: their graph, once there is one, and what it writes."""

    def __init__(self, penalties: tuple[str, ...], noise: StaticNoise) -> None:
        self.penalties, self.noise = penalties, noise
        self.steps = 0
        self.replay: Callable[[], None] | None = None
        self.values: Values = {}


class CapturedStep:
    """Does what `train_step` does for the images and labels of this process, from the fourth step of a kind by replay.

    `say` gets a sentence when steps are captured, and one where that fails: all further steps are then done by
    `train_step`, as are steps with another number of images. Where a tensor of `state` lies elsewhere than before, or a
    learning rate or beta has changed, the steps are captured anew, after as many others. None waits for the device.
    """

    def __init__(
        self, state: TrainState, config: TrainConfig, say: Callable[[str], None], recorder: Recorder | None = None
    ) -> None:
        self.state, self.config, self.say = state, config, say
        self.device = state.world.device
        self.recorder = recorder or CudaRecorder(self.device)
        self.has_failed = False
        state.g_spectral.in_place = state.d_spectral.in_place = True
        dtype = next(state.ema.parameters()).dtype
        self.share = torch.zeros((), dtype=dtype, device=self.device)
        self.batch: tuple[Tensor, Tensor] | None = None
        self.kinds: dict[tuple[str, ...], _Kind] = {}
        self.seen: list[Any] = []

    def __call__(self, images: Tensor, labels: Tensor) -> Values:
        """Do one step; arguments and result are those of `train_step`."""
        if self.has_failed or not self._fits(images, labels):
            return train_step(self.state, self.config, images, labels, self.device)
        state = self.state
        kind = self._filled(images, labels)
        if kind.replay is None and kind.steps >= WARM_UP and not self._capture(kind):
            return train_step(state, self.config, images, labels, self.device)
        if kind.replay is None:
            with self.recorder.warming_up():
                values = self._step(kind)
        else:
            kind.replay()
            values = _copies(kind.values)
        kind.steps += 1
        state.step += 1
        return values

    def _step(self, kind: _Kind) -> Values:
        assert self.batch is not None
        return update_networks(self.state, *self.batch, kind.noise, self.share)

    def _fits(self, images: Tensor, labels: Tensor) -> bool:
        if self.batch is None:
            self.batch = tuple(torch.empty_like(each, device=self.device) for each in (images, labels))  # type: ignore[assignment]
        assert self.batch is not None
        return self.batch[0].shape == images.shape and self.batch[1].shape == labels.shape

    def _filled(self, images: Tensor, labels: Tensor) -> _Kind:
        """Put what this step reads into its places, and return its kind."""
        state, config = self.state, self.config
        assert self.batch is not None
        for place, given in zip(self.batch, (images, labels), strict=True):
            place.copy_(given, non_blocking=True)
        self.share.fill_(ema_share(config.ema_decay, state.step + 1))
        noise = Noise(config, state.step, self.device, state.world, state.rollbacks)
        names = tuple(penalty_weights(config, state.step))
        if (kind := self.kinds.get(names)) is None:
            kind = self.kinds[names] = _Kind(names, StaticNoise(noise))
        else:
            kind.noise.refill(noise)
        if kind.replay is not None and self.seen != (seen := seen_by_graphs(state)):
            self.seen = seen
            for each in self.kinds.values():
                each.replay, each.values, each.steps = None, {}, 0
        return kind

    def _capture(self, kind: _Kind) -> bool:
        """Record a step, which changes no tensor of the state; return False if that fails."""
        state = self.state
        groups = state.g_spectral, state.d_spectral
        before, sigmas = seen_by_graphs(state), [group.state_dict() for group in groups]
        if not any(each.replay for each in self.kinds.values()):
            self.seen = before
        try:
            with capturable(state.g_optimizer, state.d_optimizer):
                replay, kind.values = self.recorder.record(lambda: self._step(kind))
            if seen_by_graphs(state) != before:
                raise RuntimeError("a tensor that the next step needs was made anew")
        except Exception as error:  # of any library that the step calls
            self._give_up(error)
            for group, saved in zip(groups, sigmas, strict=True):
                group.load_state_dict(saved)
            return False
        kind.replay = replay
        some = f" with {' and '.join(kind.penalties)}" if kind.penalties else ""
        self.say(f"from step {state.step + 1} on each step{some} is the replay of a CUDA graph")
        return True

    def _give_up(self, error: BaseException) -> None:
        while error.__context__:  # the first error is the cause: the end of the capture fails after it
            error = error.__context__
        self.has_failed = True
        self.kinds.clear()
        state = self.state
        state.discriminator.requires_grad_(True)
        for optimizer in (state.g_optimizer, state.d_optimizer):
            optimizer.zero_grad(set_to_none=True)  # they lie in the memory of the graph
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        words = (str(error).strip() or type(error).__name__).splitlines()[0]
        self.say(f"steps are not captured as a CUDA graph: at step {state.step + 1} the capture failed ({words})")


def captured_step(
    config: TrainConfig, state: TrainState, say: Callable[[str], None], size_was_found: bool = False
) -> CapturedStep | None:
    """Return what replays the steps of a run that asks for it, else None; `say` gets a sentence where it cannot be.

    "auto" is off: no record of a GPU says yet that the replay is faster. `size_was_found`: see `refusal`.
    """
    if config.cuda_graph is not True:
        return None
    if why := refusal(state, size_was_found):
        say(f"steps are not captured as a CUDA graph: {why}")
        return None
    return CapturedStep(state, config, say)


def refusal(state: TrainState, size_was_found: bool = False) -> str:
    """Return why steps cannot be captured, "" where they can.

    `size_was_found`: whether the micro-batches were made as large as the device's memory allows without a graph.
    """
    if state.world.device.type != "cuda":
        return f"the run is on {state.world.device}"
    if state.world.size > 1:
        return f"{state.world.size} processes exchange gradients between the parts of a step"
    if state.d_scaler.is_enabled():
        return (
            "fp16 skips steps whose gradient overflows, which is decided outside the graph; bf16 needs no such scaler"
        )
    if size_was_found:
        return "--micro-batch-size auto fills the memory of the device, and a graph has its own; give a number"
    for network in (state.generator, state.discriminator):
        for name, module in network.named_modules():
            if is_hooked(module):
                return f"{name or type(module).__name__} has hooks, and a replay calls none"
    for optimizer in (state.g_optimizer, state.d_optimizer):
        if any("capturable" not in group for group in optimizer.param_groups):
            return f"{type(optimizer).__name__} has no option capturable"
        if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:  # type: ignore[attr-defined]
            return f"{type(optimizer).__name__} has hooks, and a replay calls none"
    return ""


def is_hooked(module: nn.Module) -> bool:
    """Return whether somebody's Python runs when `module` computes, or when its parameters get their gradients."""
    every = nn.modules.module
    pre = [hook for hook in module._forward_pre_hooks.values() if not isinstance(getattr(hook, "__self__", None), Link)]
    hooks = (
        pre, module._forward_hooks, module._backward_hooks, module._backward_pre_hooks, every._global_forward_hooks,
        every._global_forward_pre_hooks, every._global_backward_hooks, every._global_backward_pre_hooks,
        *(getattr(p, name, None) for p in module._parameters.values() for name in PARAMETER_HOOKS),
    )  # fmt: skip
    return any(hooks)


def seen_by_graphs(state: TrainState) -> list[Any]:
    """Return the addresses of all that a step hands to the next, and the numbers that a graph of a step holds."""
    models = (state.generator, state.discriminator, state.ema, state.lecam)
    found: list[Any] = [
        tensor.data_ptr() for model in models for tensor in itertools.chain(model.parameters(), model.buffers())
    ]
    for group in (state.g_spectral, state.d_spectral):
        found += [tensor.data_ptr() for tensor in group.tensors()]
    for optimizer in (state.g_optimizer, state.d_optimizer):
        for moments in optimizer.state.values():
            found += [moment.data_ptr() for moment in moments.values() if isinstance(moment, Tensor)]
        found += [
            (group["lr"], group["betas"], group["eps"], group["weight_decay"]) for group in optimizer.param_groups
        ]
    return found


@contextmanager
def capturable(*optimizers: torch.optim.Optimizer) -> Iterator[None]:
    """Let the optimizers step inside a capture; checkpoints do not keep the option, which other devices refuse."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    before = [group["capturable"] for group in groups]
    for group in groups:
        group["capturable"] = True
    try:
        yield
    finally:
        for group, option in zip(groups, before, strict=True):
            group["capturable"] = option


def _copies(values: Values) -> Values:
    """Return `values` in memory that the next replay does not write; one copy."""
    return dict(zip(values, torch.stack(list(values.values())).unbind(), strict=True))
