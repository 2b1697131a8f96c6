"""Which backend runs an op, and why."""

from __future__ import annotations

import functools
import logging
import os
import shutil
import sys
import sysconfig
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple, TypeVar, get_args

import torch
from torch import Tensor

from sagan_fast.choices import Backend
from sagan_fast.kernels.attention import cpu
from sagan_fast.kernels.batch_norm import cpu as batch_norm_cpu
from sagan_fast.kernels.checks import FLOAT_DTYPES
from sagan_fast.kernels.checks import is_autocast_on as is_autocast_on
from sagan_fast.kernels.configs import AMD, MAX_D_QK, MAX_D_V, MIN_ARCH, NEEDS_TRITON, Arch, has_fast_float32
from sagan_fast.kernels.launch import device_arch, precision_of
from sagan_fast.kernels.spectral_norm.tables import MAX_COLUMNS, MAX_ROWS
from sagan_fast.words import counted

HAS_TRITON = find_spec("triton") is not None  # once: looking takes longer than a launch

BACKENDS = get_args(Backend)
"""Backends of attention."""

SPECTRAL_NORM_BACKENDS = ("auto", "eager", "triton")

BATCH_NORM_BACKENDS = ("auto", "eager", "cpu", "triton")

# On the CPU attention without the map in memory pays from this many scores (B * N * M: the map no longer fits the
# caches) and keys on; below, the map is faster. Measured: docs/log.md, "Attention on the CPU".
CPU_FUSED_MIN_SCORES = 2**23
CPU_FUSED_MIN_KEYS = 256

_logger = logging.getLogger("sagan_fast")
_Function = TypeVar("_Function", bound=Callable[..., object])


class Choice(NamedTuple):
    """The backend that runs, and why.

    `backend` is "eager", "sdpa", "triton" or "cpu": a chunk of the map at a time (kernels/attention/cpu.py), which
    "auto" takes on the CPU where it is faster than "sdpa".
    """

    backend: str
    why: str
    sizes: tuple[int, ...] = ()
    """B, N and M of maps that the reason begins with"""

    @property
    def reason(self) -> str:
        """`why`, after the number and `sizes` of the maps if they matter: put together only where it is read."""
        if not self.sizes:
            return self.why
        B, N, M = self.sizes
        return f"{counted(B, 'map')} of {N} x {M}: {self.why}"

    def __str__(self) -> str:
        return f"{self.backend} ({self.reason})"


def product_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which products with `x` are computed: autocast's, where it is on and x is not float64."""
    if is_autocast_on(x.device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def check_backend(op: str, backend: str, backends: Sequence[str]) -> None:
    """Raise ValueError unless `backend` is one of `backends`."""
    if backend not in backends:
        raise ValueError(f"{op}: backend must be one of {', '.join(backends)}, got {backend!r}")


def _constant(function: _Function) -> _Function:
    """Let torch.compile call `function`, which asks the device and the disk, and keep its answer instead of tracing it.

    `torch.compiler.assume_constant_result` sets the same mark, but importing Dynamo for it takes over a second.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@_constant
def triton_refusal(device: torch.device, dtype: torch.dtype, min_arch: int = 0) -> str | None:
    """Return why the Triton kernels cannot run on `device` with products in `dtype`, or None where they can.

    `min_arch` is the lowest compute capability that they run on, 80 for 8.0. In the interpreter float64 runs too.
    """
    if not HAS_TRITON:
        return "triton is not installed"
    if device.type == "cuda":
        arch, name = device_arch(device.index or 0), torch.cuda.get_device_name(device)
        if isinstance(arch, str):
            if arch not in AMD:
                return f"{name} is {arch}, and the kernels are compiled for {', '.join(AMD)}"
        elif arch < min_arch:
            return f"{name} has compute capability {arch / 10}, below {min_arch / 10}"
        elif older := older_triton(arch):
            return f"{name} has compute capability {arch / 10}, which Triton {older} cannot compile for"
        return build_refusal() if dtype in FLOAT_DTYPES else f"{dtype} is not float32, float16 or bfloat16"
    if device.type != "cpu" or os.environ.get("TRITON_INTERPRET") != "1":
        return f"the tensors are on {device.type}, not on a CUDA device"
    if dtype not in (torch.float64, torch.float32, torch.float16) and not interpreter_computes(dtype):
        return f"Triton's interpreter does not compute {dtype} rightly"
    return None


@_constant
def unmeasured(device: torch.device) -> str | None:
    """Return why "auto" does not take the kernels on `device`, where they would run but nobody has run them yet."""
    said = "its kernels were compiled for AMD, but never run there (ask for 'triton')"
    return said if isinstance(device_arch(device.index or 0), str) else None


@_constant
def slow_float32(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why "auto" does not take the attention kernels for float32, where they would not use the tensor cores."""
    if dtype != torch.float32 or precision_of(dtype) == "tf32" or has_fast_float32(device_arch(device.index or 0)):
        return None
    return "its float32 products would not run on the tensor cores (allow TF32, or ask for 'triton')"


def older_triton(arch: Arch) -> str | None:
    """Return the version of the installed Triton if it is too old to compile for `arch`, else None."""
    if not isinstance(arch, int) or arch not in NEEDS_TRITON:
        return None
    from triton import __version__ as version

    return version if tuple(int(part) for part in version.split(".")[:2]) < NEEDS_TRITON[arch] else None


@functools.cache
def build_refusal() -> str | None:
    """Return why Triton cannot build its launchers, or None where it can: it compiles C for each kernel it launches."""
    compilers = [os.environ["CC"]] if os.environ.get("CC") else ["gcc", "clang"]
    if not any(shutil.which(compiler) for compiler in compilers):
        return f"Triton needs a C compiler, and there is no {' or '.join(compilers)} (install one, or set CC)"
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    return None if header.exists() else f"Triton needs Python's C headers, and there is no {header}"


def interpreter_computes(dtype: torch.dtype) -> bool:
    """Return whether `dtype` is bfloat16 and Triton's interpreter was taught it (tests/shared_by_tests.py)."""
    taught = getattr(sys.modules.get("triton.runtime.interpreter"), "computes_bfloat16", False)
    return bool(taught) and dtype == torch.bfloat16


def too_wide(D_QK: int, D_V: int) -> str | None:
    """Return why heads of these widths do not fit the Triton kernels, or None where they do."""
    if D_QK <= MAX_D_QK and D_V <= MAX_D_V:
        return None
    return f"D_QK = {D_QK}, D_V = {D_V} is over what its tiles hold, {MAX_D_QK} and {MAX_D_V}"


def choose(op: str, backend: str, like: Tensor, B: int, N: int, M: int, D_QK: int, D_V: int) -> Choice:
    """Return the backend that runs attention on the device and dtype of `like`, with B images of N queries and M keys.

    Raises ValueError for a name that is not in `BACKENDS`. An explicit choice is never replaced by another, but
    for torch.export, which keeps only the forward of an autograd.Function (2.14.1). If "triton" cannot run, raises
    ValueError where the widths are at fault, else RuntimeError.
    """
    check_backend(op, backend, BACKENDS)
    if torch.compiler.is_exporting():
        return Choice("eager", "an exported program has no gradients of the other backends")
    if backend == "triton":
        if refusal := too_wide(D_QK, D_V):
            raise ValueError(f"{op}: backend must be 'sdpa' or 'eager' for these widths, got 'triton': {refusal}")
        if refusal := triton_refusal(like.device, product_dtype(like), MIN_ARCH):
            raise RuntimeError(f"{op}: backend must be able to run here, got 'triton': {refusal}")
        return Choice("triton", "asked for")
    if backend != "auto":
        return Choice(backend, "asked for")
    choice = _automatic(like, B, N, M, D_QK, D_V)
    if not torch.compiler.is_compiling() and _logger.isEnabledFor(logging.DEBUG):
        _logger.debug("%s: %s", op, choice)
    return choice


def _automatic(like: Tensor, B: int, N: int, M: int, D_QK: int, D_V: int) -> Choice:
    if like.is_cuda:
        refusal = (
            too_wide(D_QK, D_V)
            or triton_refusal(like.device, product_dtype(like), MIN_ARCH)
            or unmeasured(like.device)
            or slow_float32(like.device, product_dtype(like))
        )
        if refusal is None:
            return Choice("triton", f"{like.device} and {product_dtype(like)} are supported")
        return Choice("sdpa", f"not triton: {refusal}")
    if like.device.type == "mps":  # https://github.com/pytorch/pytorch/issues/176767
        return Choice("eager", "on mps PyTorch's fused attention is wrong before 2.12 where v is not as wide as q")
    sizes = (B, N, M)
    if like.is_cpu and (B * N * M < CPU_FUSED_MIN_SCORES or M < CPU_FUSED_MIN_KEYS):
        return Choice("eager", "small ones are faster in memory on the CPU", sizes)
    if cpu.runs_on(like.device, product_dtype(like)):
        return Choice("cpu", "a chunk at a time, not stored; on the CPU faster than sdpa", sizes)
    return Choice("sdpa", "fused attention does not store them", sizes)


def too_large(weight: Tensor) -> bool:
    """Return whether `weight` (R, ...) has more rows or columns than the spectral-norm kernels take."""
    rows = weight.shape[0]
    return rows > MAX_ROWS or weight.numel() > rows * MAX_COLUMNS


def choose_spectral_norm(op: str, backend: str, weights: Sequence[Tensor]) -> Choice:
    """Return the backend, "eager" or "triton", for `weights` of one device and dtype.

    Raises ValueError for a name that is not in `SPECTRAL_NORM_BACKENDS`, RuntimeError if "triton" was asked for and
    cannot run.
    """
    check_backend(op, backend, SPECTRAL_NORM_BACKENDS)
    device, dtype = weights[0].device, weights[0].dtype
    if backend == "eager":
        return Choice("eager", "asked for")
    if backend == "auto" and device.type != "cuda":
        return Choice("eager", f"the weights are on {device}")
    refusal = triton_refusal(device, dtype) or (unmeasured(device) if backend == "auto" else None)
    if dtype not in FLOAT_DTYPES:
        refusal = f"the weights are {dtype}"
    elif refusal is None and any(too_large(weight) for weight in weights):
        refusal = f"a weight has more than {MAX_ROWS} rows or {MAX_COLUMNS} columns"
    if refusal is None:
        return Choice("triton", "asked for" if backend == "triton" else f"{device} and {dtype} are supported")
    if backend == "auto":
        return Choice("eager", f"not triton: {refusal}")
    raise RuntimeError(f"{op}: backend must be able to run here, got 'triton': {refusal}")


def choose_batch_norm(op: str, backend: str, x: Tensor) -> Choice:
    """Return the backend, "eager", "cpu" or "triton", for batch norm of the map `x`.

    Raises ValueError for a name that is not in `BATCH_NORM_BACKENDS`, RuntimeError if "cpu" or "triton" was asked for
    and cannot run.
    """
    check_backend(op, backend, BATCH_NORM_BACKENDS)
    if backend == "eager":
        return Choice("eager", "asked for")
    if backend in ("auto", "cpu") and batch_norm_cpu.runs_on(x):
        return Choice("cpu", "asked for" if backend == "cpu" else f"the map is on {x.device}")
    if backend == "cpu":
        found = f"{x.dtype} on {x.device}"
        raise RuntimeError(f"{op}: backend 'cpu' must get a float32 or float64 map on the CPU, got {found}")
    if backend == "auto" and not x.is_cuda:
        return Choice("eager", f"the map is on {x.device}")
    refusal = triton_refusal(x.device, x.dtype, MIN_ARCH) or (unmeasured(x.device) if backend == "auto" else None)
    if refusal is None:
        return Choice("triton", "asked for" if backend == "triton" else f"{x.device} and {x.dtype} are supported")
    if backend == "auto":
        return Choice("eager", f"not triton: {refusal}")
    raise RuntimeError(f"{op}: backend must be able to run here, got 'triton': {refusal}")
