"""What several tests share: comparisons with float64, random inputs, other processes, bfloat16 in the interpreter."""

from __future__ import annotations

import importlib.util
import inspect
import multiprocessing
import os
import socket
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.accuracy import DTYPE_NAMES, RMS_TOLERANCE, rel_rms

on_a_real_gpu = pytest.mark.skipif("ttsem" in sys.modules, reason="ttsem has no CUDA graphs, nor Inductor's kernels")
"""Beside the mark gpu: tests of what ttsem's fake CUDA device cannot do."""


def leave_broken_device(in_worker: bool) -> None:
    """End this process if its CUDA device computes nothing more: after an illegal access, every test would fail.

    In a worker of pytest-xdist the process dies, which is reported as this test's failure, and another worker goes on.
    Else the session ends.
    """
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        message = f"the CUDA device is lost to this process: {error}"
        if in_worker:
            print(message, file=sys.__stderr__, flush=True)
            os._exit(1)
        pytest.exit(f"{message}; pytest-xdist would go on in another process", returncode=1)


def assert_close_to_truth(
    name: str,
    actual: Tensor,
    truth: Tensor,
    eager: Tensor | None = None,
    precision: str | None = None,
    terms: Tensor | None = None,
) -> None:
    """Assert that `actual` is as near to the float64 `truth` as DESIGN §5 asks.

    Its relative RMS error must be inside the table for `precision` (by default that of its dtype) and, where the
    same computation by plain PyTorch in the same dtype is given as `eager`, at most twice its error plus a floor of a
    tenth of the table's entry.

    Sums that cancel are small beside their float32 rounding. There `terms` has the root of the sum of the squares of
    what each element of `truth` adds up, and 2e-6 of it is allowed besides.
    """
    precision = precision or DTYPE_NAMES[actual.dtype]
    rounding = 0.0 if terms is None else 2e-6 * rel_rms(truth + terms, truth)
    error, table = rel_rms(actual, truth), RMS_TOLERANCE[precision]
    limit = table + rounding
    assert error <= limit, f"{name}: relative RMS error {error:.3g} is over {limit:.3g} ({precision})"
    if eager is not None:
        twice = 2 * rel_rms(eager, truth) + 0.1 * table + rounding
        assert error <= twice, f"{name}: relative RMS error {error:.3g} is over twice eager's plus a floor, {twice:.3g}"


def assert_gradient(
    name: str,
    found: Tensor,
    truth: Tensor,
    eager: Tensor | None = None,
    dtype: torch.dtype | None = None,
    terms: Tensor | None = None,
) -> None:
    """Assert that the error of `found` is at most twice eager's plus the table's share of `truth`.

    Where a gradient is a sum that may be small beside its `terms`, the share is of these.
    """
    if eager is None:
        assert_close_to_truth(name, found, truth)
        return
    limit = RMS_TOLERANCE[DTYPE_NAMES[dtype or found.dtype]]
    error = (found.double() - truth).norm()
    assert error <= 2 * (eager.double() - truth).norm() + limit * (truth if terms is None else terms).norm(), name


def attention_terms(q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, scale: float = 1.0) -> tuple[Tensor, ...]:
    """Return the `terms` of `assert_close_to_truth` for attention's output and its gradients of q, k and v, in float64.

    A weight is as uncertain as its score, so by the score's own terms.
    """
    q, k, v, d_out = (t.detach().double() for t in (q, k, v, d_out))
    weights = (scale * q @ k.mT).softmax(-1).square()
    q, k, v, d_out = (t.square() for t in (q, k, v, d_out))
    d_weights, rounded = d_out @ v.mT, weights * (1 + scale**2 * q @ k.mT)
    d_scores = scale**2 * (rounded * d_weights + weights * (rounded * d_weights).sum(-1, keepdim=True))
    return tuple(t.sqrt() for t in (rounded @ v, d_scores @ k, d_scores.mT @ q, rounded.mT @ d_out))


def randn(*shape: int, generator: torch.Generator, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> Tensor:
    """Return `scale` times normal random numbers of `shape` and `dtype`, drawn in float64 on the CPU."""
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def largest_is_clear(maps: Tensor, lead: float = 1e-5) -> bool:
    """Return whether the largest value of every 2x2 window of `maps` (B, C, H, W) leads the next by `lead`.

    Where it does not, float32's rounding may decide which of the two a max pool's gradient goes to, and no comparison
    with float64 holds: draw other inputs.
    """
    first, second = maps.unfold(2, 2, 2).unfold(3, 2, 2).flatten(4).topk(2).values.unbind(-1)
    return bool((first - second >= lead).all())


def teach_interpreter_bfloat16() -> None:
    """Have Triton's interpreter compute bfloat16 rightly in this process; call it before a kernel runs.

    As it comes (3.6 to 3.9) it holds bfloat16 as the bits of an integer: products multiply the bits, sums add them,
    and a cast from float32 cuts off instead of rounding to the nearest. With the bfloat16 that ml_dtypes gives NumPy,
    elements are of the type they are said to be: every operation is computed in float32 and rounded, as on a GPU, and a
    product adds up in float32. `ops.backends` lets "triton" run bfloat16 in the interpreter after this only.
    """
    import ml_dtypes
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    if getattr(interpreter, "computes_bfloat16", False):
        return
    builder, bfloat16, numpy_dtype = (
        interpreter.InterpreterBuilder,
        np.dtype(ml_dtypes.bfloat16),
        interpreter._get_np_dtype,
    )
    cast_float, load, store = builder.create_fp_to_fp, builder.create_masked_load, builder.create_masked_store

    def with_bfloat16(dtype: Any) -> Any:
        return bfloat16 if dtype.scalar == tl.bfloat16 else numpy_dtype(dtype)

    def cast_any(self: Any, source: Any, dtype: Any) -> Any:
        with np.errstate(over="ignore", invalid="ignore"):  # infinities and NaN are values here
            return interpreter.TensorHandle(source.data.astype(with_bfloat16(dtype)), dtype.scalar)

    def cast_float_any(self: Any, source: Any, dtype: Any, rounding: Any) -> Any:
        known = tl.bfloat16 not in (source.dtype.scalar, dtype.scalar)
        return cast_float(self, source, dtype, rounding) if known else cast_any(self, source, dtype)

    def load_any(self: Any, ptrs: Any, mask: Any, other: Any, *hints: Any) -> Any:
        dtype = ptrs.get_element_ty()
        if dtype != tl.bfloat16:
            return load(self, ptrs, mask, other, *hints)
        filled = np.zeros_like(ptrs.data, dtype=np.uint16) if other is None else other.data.view(np.uint16)
        bits = interpreter._interpreter.load(ptrs.data, mask.data, filled, np.dtype(np.uint16))
        return interpreter.TensorHandle(bits.view(bfloat16), dtype)

    def store_any(self: Any, ptrs: Any, value: Any, mask: Any, *hints: Any) -> Any:
        if value.data.dtype == bfloat16:
            value = interpreter.TensorHandle(value.data.view(np.uint16), tl.uint16)
        return store(self, ptrs, value, mask, *hints)

    def constant(self: Any, value: float) -> Any:
        return interpreter.TensorHandle(np.array([value], dtype=bfloat16), tl.bfloat16)

    interpreter._get_np_dtype = with_bfloat16
    builder.cast_impl, builder.create_fp_to_fp = cast_any, cast_float_any
    builder.create_masked_load, builder.create_masked_store, builder.get_bf16 = load_any, store_any, constant
    interpreter.computes_bfloat16 = True


def spectral_norm_inputs(
    shapes: Sequence[tuple[int, ...]], generator: torch.Generator, dtype: torch.dtype = torch.float32, steps: int = 2
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Return random weights of `shapes` and `dtype`, and float32 u and v after `steps` iterations from random ones.

    Not from random ones as they are: sigma = uᵀWv would be a sum that cancels, whose float32 error measures nothing.
    """
    weights = [randn(*shape, generator=generator, dtype=dtype, scale=0.1) for shape in shapes]
    us, vs = [], []
    for weight in weights:
        matrix = weight.double().flatten(1)
        v = randn(matrix.shape[1], generator=generator)
        for _ in range(steps):
            u = torch.nn.functional.normalize(matrix @ v, dim=0)
            v = torch.nn.functional.normalize(matrix.T @ u, dim=0)
        us.append(u.float())
        vs.append(v.float())
    return weights, us, vs


def spectral_norm_truth(
    weight: Tensor, u: Tensor, v: Tensor, n_power_iterations: int = 1, update: bool = True, v_first: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return W/sigma, sigma, u and v in float64, one weight at a time, in either order of the iteration."""
    matrix, u, v = weight.detach().double().flatten(1), u.double(), v.double()
    for _ in range(n_power_iterations if update else 0):
        if v_first:
            v = torch.nn.functional.normalize(matrix.T @ u, dim=0)
            u = torch.nn.functional.normalize(matrix @ v, dim=0)
        else:
            u = torch.nn.functional.normalize(matrix @ v, dim=0)
            v = torch.nn.functional.normalize(matrix.T @ u, dim=0)
    sigma = u @ matrix @ v
    return (matrix / sigma).view(weight.shape), sigma, u, v


def tiny_extractor_file(path: Path, seed: int = 0) -> Path:
    """Write a TorchScript feature extractor of random weights to `path` and return it: 24 features, 7 logits, fast."""
    with torch.random.fork_rng([]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        torch.manual_seed(seed)
        torch.jit.save(torch.jit.script(_TinyExtractor()), str(path))
    return path


class _TinyExtractor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 24, 5, stride=4)
        self.head = nn.Linear(24, 7)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.relu(self.conv(images.float() / 32 - 4))
        features = x.mean((2, 3)) + x.amax((2, 3))
        return features, self.head(features)


def assert_same(a: Any, b: Any, where: str = "") -> None:
    """Assert that nested dicts, lists and tensors are equal, tensors bit for bit; `where` is the path so far."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


def start_ranks(function: Callable[..., Any], size: int, *args: Any) -> list[Any]:
    """Start `size` processes with torchrun's environment, each calling `function(*args)`; return them, by rank.

    `function` must be at the top of its file and importable from it. The processes are forked from a server that has
    imported PyTorch and the trainer once, with one thread and no CUDA; they are multiprocessing processes.
    """
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [
            "torch._dynamo",
            "pytest",
            "sagan_fast.training.loop",
            "sagan_fast.commands.train",
            "torch.utils.tensorboard",
            "jsonargparse",
            "yaml",
            "PIL.Image",
            "sagan_fast.data.shapes",
        ]
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in range(size):
        environment = {
            "RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size,
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo",
        }  # fmt: skip
        where = inspect.getfile(function), function.__name__
        ranks.append(context.Process(target=_call_as_rank, args=(environment, *where, args)))
        ranks[-1].start()
    return ranks


def run_ranks(function: Callable[..., Any], size: int, *args: Any, timeout: float = 120.0) -> list[int]:
    """Do as `start_ranks` and wait for the end; return the exit statuses by rank. Kills what outlives `timeout`."""
    ranks = start_ranks(function, size, *args)
    try:
        for process in ranks:
            process.join(timeout)
    finally:
        for process in ranks:
            process.kill()
            process.join()
    return [process.exitcode for process in ranks]


def _call_as_rank(environment: dict[str, Any], path: str, name: str, args: tuple[Any, ...]) -> None:
    os.environ.update({key: str(value) for key, value in environment.items()})
    torch.set_num_threads(1)
    spec = importlib.util.spec_from_file_location("called_as_rank", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    status = getattr(module, name)(*args)
    raise SystemExit(status if isinstance(status, int) else 0)
