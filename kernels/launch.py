"""The one door of every launch: run on tensors or, on tensors without memory, recorded as a `Plan`.

What is compiled and counted without a GPU is therefore what runs on one. Also here: the names of dtypes.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .configs import INTERPRETED_ARCH, Arch, LaunchConfig

DTYPES = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "tf32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}
"""How products are computed, and the dtype of the tensors they are computed on."""

POINTERS = {dtype: f"*{name}" for name, dtype in DTYPES.items() if name != "tf32"} | {
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
"""Triton's type of a pointer to elements of a dtype."""


@dataclass(frozen=True)
class Needs:
    """What a launch cannot do without, for its whole grid.

    `flops` count a multiply and an add as two; `bytes_read` and `bytes_written` count each byte of memory once.
    """

    flops: int = 0
    exps: int = 0
    bytes_read: int = 0
    bytes_written: int = 0


@dataclass(frozen=True)
class Plan:
    """One launch, said without tensors: enough to compile it without a GPU and to know what it needs.

    `signature` gives Triton's type of every argument that is not in `constexprs`; `divisible_by_16` names those that
    the launch specialises (aligned pointers, strides). For the counts of work see `Needs`.
    """

    name: str
    kernel: Any
    dtype: str
    config: str
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    grid: tuple[int, ...]
    divisible_by_16: tuple[str, ...] = ()
    flops: int = 0
    exps: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def programs(self) -> int:
        """Number of programs in the grid."""
        return math.prod(self.grid)


@dataclass
class Recording:
    """The launches of a `with recording(...)` block, as plans, for one architecture and precision."""

    arch: Arch
    precision: str
    plans: list[Plan] = field(default_factory=list)


@dataclass(frozen=True)
class Launch:
    """A launch without its tensors: grid, config, run-time numbers and compile-time values by argument.

    `needs` is called only when recording.
    """

    grid: tuple[int, ...]
    config: LaunchConfig
    numbers: dict[str, Any]
    constexprs: dict[str, Any]
    needs: Callable[[], Needs]


_recording: Recording | None = None
_ready: dict[tuple[Any, ...], tuple[Callable[..., Any], list[Any]]] = {}
"""Launches that have run on a GPU: what runs them, and the arguments that follow the tensors."""
MAX_READY = 4096
"""So many are kept: maps of ever new sizes, or a scale that moves, must not fill the memory."""


@contextmanager
def recording(arch: Arch, precision: str) -> Iterator[Recording]:
    """Record every launch as a `Plan` instead of running it; launchers take meta tensors inside."""
    global _recording
    outer, _recording = _recording, Recording(arch, precision)
    try:
        yield _recording
    finally:
        _recording = outer


@functools.cache
def device_arch(index: int) -> Arch:
    """Return what kernels for the CUDA or ROCm device `index` are compiled for."""
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        return str(properties.gcnArchName).partition(":")[0]
    return 10 * int(properties.major) + int(properties.minor)


def arch_of(tensor: Tensor) -> Arch:
    """Return what the launch on `tensor` is compiled for."""
    if _recording is not None:
        return _recording.arch
    return device_arch(tensor.device.index or 0) if tensor.device.type == "cuda" else INTERPRETED_ARCH


def precision_of(dtype: torch.dtype) -> str:
    """Return "fp64", "fp32", "tf32", "fp16" or "bf16": how products of `dtype` are computed.

    float32 is computed in TF32 only where the user allowed it for matrix products
    (`torch.set_float32_matmul_precision`, `torch.backends.cuda.matmul`).
    """
    if _recording is not None:
        return _recording.precision
    if dtype == torch.float32 and torch.version.hip is None:
        return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "fp32"
    return POINTERS[dtype][1:]


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which products of `dtype` are added up: float64 for itself, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def size_of(*tensors: Tensor | None) -> int:
    """Return the bytes of all elements of `tensors`; None counts nothing."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def launch(
    name: str,
    kernel: Any,
    tensors: Mapping[str, Tensor | None],
    key: tuple[Any, ...] | None,
    describe: Callable[[], Launch],
) -> None:
    """Run `kernel` on `tensors` (its first arguments in order, at least one), or record it inside `recording`.

    `describe()` gives the other arguments. On a GPU the compiled kernel and these arguments are kept, because Triton
    takes four times as long to find them again. `key` must hold everything they depend on, except presence, dtype and
    device of the tensors, which are added to it. A launch with `key` None is not kept: its numbers change every time.
    """
    if _recording is not None:
        _recording.plans.append(_plan(name, kernel, tensors, describe(), _recording))
        return
    kinds: list[Any] = []
    addresses = 0
    device = None
    for tensor in tensors.values():
        if tensor is None:
            kinds.append(None)
        else:
            kinds.append(tensor.dtype)
            addresses |= tensor.data_ptr()
            device = tensor.device
    assert device is not None
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return launch(name, kernel, tensors, key, describe)
    place = (name, key, device, *kinds)
    aligned = addresses % 16 == 0  # Triton compiles for addresses that are, and for such that are not
    keeps = aligned and key is not None
    ready = _ready.get(place) if keeps else None
    if ready is not None:
        run, rest = ready
        run(*tensors.values(), *rest)
        return
    what = describe()
    if 0 in what.grid:
        return
    arguments = {**tensors, **what.numbers, **what.constexprs}
    options = _options(what.config, torch.version.hip is not None)
    compiled = kernel[what.grid](
        **arguments, num_warps=what.config.num_warps, num_stages=what.config.num_stages, **options
    )
    if keeps and compiled is not None:  # None: interpreted
        names = list(kernel.arg_names)
        assert names[: len(tensors)] == list(tensors)
        if len(_ready) >= MAX_READY:
            _ready.clear()
        _ready[place] = compiled[(*what.grid, 1, 1)[:3]], [arguments[argument] for argument in names[len(tensors) :]]


def _options(config: LaunchConfig, amd: bool) -> dict[str, Any]:
    options = {"enable_fp_fusion": True}  # Triton 3.10 turns it off by default
    return options if amd or config.maxnreg is None else {**options, "maxnreg": config.maxnreg}


def _plan(name: str, kernel: Any, tensors: Mapping[str, Tensor | None], what: Launch, recorded: Recording) -> Plan:
    config, needs, constexprs = what.config, what.needs(), what.constexprs
    signature, fixed, aligned = {}, dict(constexprs), []
    unspecialised = getattr(kernel, "do_not_specialize", None) or ()
    for key, value in {**tensors, **what.numbers}.items():
        if isinstance(value, Tensor):
            signature[key] = POINTERS[value.dtype]
            if value.storage_offset() * value.element_size() % 16 == 0:
                aligned.append(key)
        elif isinstance(value, float):
            signature[key] = "fp32"
        elif value is None or (value == 1 and key not in unspecialised):  # as Triton's specialisation has it
            fixed[key] = value
        else:
            signature[key] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and key not in unspecialised:
                aligned.append(key)
    return Plan(
        name=name,
        kernel=kernel,
        dtype=recorded.precision,
        config=str(config),
        signature=signature,
        constexprs=fixed,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        grid=what.grid,
        divisible_by_16=tuple(aligned),
        flops=needs.flops,
        exps=needs.exps,
        bytes_read=needs.bytes_read,
        bytes_written=needs.bytes_written,
        options=_options(config, isinstance(recorded.arch, str)),
    )
