"""softmax(scale q kᵀ) v on the CPU, a chunk of the map at a time, in PyTorch's products.

Each thread has chunks of its own. Only one chunk a thread is in memory, in the cache. Backward needs the base-2
log-sum-exp of each row, from which it makes a chunk again.

Why not PyTorch's fused kernel: on the CPU it wants q, k and v of one width, so q and k would be padded to D_V, nearly
twice the work at D_QK = D_V / 8. Why threads of our own: with each product split over the threads, every chunk would
wait for the slowest thread five times.
"""

import functools
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from .. import LOG2_E

CHUNK_SCORES = 2**19
"""Scores of a chunk: 2 MB, small beside the cache that the threads share. 2**17 to 2**20 are equally fast."""

SMALL = 60.0
"""If every |score| is below this (base 2), the row maximum is not subtracted: exp2 cannot overflow.

Sums of 2**60 are far from the largest float32, and 2**-60 is far above the smallest. It saves two passes over the map.
"""


class Chunk(NamedTuple):
    """Rows `rows` of the maps of images `images`."""

    images: slice
    rows: slice


def runs_on(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether products of `dtype` on `device` can be computed here: the CPU, single or double precision, now."""
    return (
        device.type == "cpu"
        and dtype in (torch.float32, torch.float64)
        and not torch.compiler.is_compiling()
        # a trace would fix the loop over chunks for the batch size of its example
        and not torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
        and torch._C._len_torch_dispatch_stack() == 0  # which other threads do not see
    )


def supports(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Return whether these are plain tensors of one dtype that `runs_on` accepts, with something to compute."""
    return (
        runs_on(q.device, q.dtype)
        and q.dtype == k.dtype == v.dtype
        and all(type(t) in (Tensor, torch.nn.Parameter) and t.numel() > 0 for t in (q, k, v))
        and not torch.is_autocast_enabled("cpu")
    )


def attention_fwd(q: Tensor, k: Tensor, v: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return softmax(scale q kᵀ) v, (B, N, D_V), and each row's log2 of the sum of exponentials, (B, N, 1).

    `q` (B, N, D_QK), `k` (B, M, D_QK), `v` (B, M, D_V), what `supports` accepts, any strides. Not differentiable.
    """
    B, N, _ = q.shape
    M, D_V = v.shape[1:]
    with torch.no_grad():
        q = q * (scale * LOG2_E)  # exp2 takes half the time of exp
        out, lse = q.new_empty(B, N, D_V), q.new_empty(B, N, 1)
        small = bool(q.norm(dim=-1).amax() * k.norm(dim=-1).amax() < SMALL)  # not with a NaN

        def work(part: Sequence[Chunk]) -> None:
            scores = _Buffer(q, part, M)
            for images, rows in part:
                p = scores(images, rows)
                torch.bmm(q[images, rows], k[images].transpose(1, 2), out=p)
                top = None if small else p.amax(-1, keepdim=True)
                if top is not None:
                    p.sub_(top)
                sums = p.exp2_().sum(-1, keepdim=True)
                torch.bmm(p, v[images], out=out[images, rows])
                out[images, rows].div_(sums)
                lse[images, rows] = sums.log2_() if top is None else top.add_(sums.log2_())

        _share(work, _parts(B, N, M))
    return out, lse


def attention_bwd(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients for q, k and v of what `attention_fwd` computed, from its results and `d_out`.

    The same bits on every call with the same number of threads. Not differentiable.
    """
    B, N, D_QK = q.shape
    M, D_V = v.shape[1:]
    with torch.no_grad():
        # one more column takes the row's number off in the product itself
        ones = k.new_ones(B, M, 1)
        q_lse, k_one = torch.cat([q * (scale * LOG2_E), -lse], -1), torch.cat([k, ones], -1).transpose(1, 2)
        d_delta = torch.cat([d_out, -(d_out * out).sum(-1, keepdim=True)], -1)
        v_one = torch.cat([v, ones], -1).transpose(1, 2)
        k_t = k.transpose(1, 2).contiguous()
        parts = _parts(B, N, M)
        # transposed, so that the short side is the rows of the products; two parts may share an image
        d_q = q.new_empty(B, D_QK, N)
        sums = [
            (q.new_zeros(images, D_QK, M), q.new_zeros(images, D_V, M))
            for images in (part[-1].images.stop - part[0].images.start for part in parts)
        ]

        def work(part: Sequence[Chunk]) -> None:
            first = part[0].images.start
            d_k, d_v = sums[parts.index(part)]
            for_p, for_d_s = _Buffer(q, part, M), _Buffer(q, part, M)
            for images, rows in part:
                p, d_s = for_p(images, rows), for_d_s(images, rows)
                q_rows, d_rows = q_lse[images, rows], d_delta[images, rows]
                here = slice(images.start - first, images.stop - first)
                torch.bmm(q_rows, k_one[images], out=p).exp2_()
                d_v[here].baddbmm_(d_rows[..., :D_V].transpose(1, 2), p)
                torch.bmm(d_rows, v_one[images], out=d_s).mul_(p)
                torch.bmm(k_t[images], d_s.transpose(1, 2), out=d_q[images, :, rows])
                d_k[here].baddbmm_(q_rows[..., :D_QK].transpose(1, 2), d_s)

        _share(work, parts)
        d_k, d_v = q.new_zeros(B, D_QK, M), q.new_zeros(B, D_V, M)
        for part, (part_k, part_v) in zip(parts, sums, strict=True):
            images = slice(part[0].images.start, part[-1].images.stop)
            d_k[images] += part_k
            d_v[images] += part_v
    return d_q.mul_(scale).transpose(1, 2), d_k.div_(LOG2_E).transpose(1, 2), d_v.transpose(1, 2)


class _Buffer:
    """Memory for the largest chunk of a part, handed out as (images, rows, M)."""

    def __init__(self, like: Tensor, part: Sequence[Chunk], M: int) -> None:
        self.M = M
        self.memory = like.new_empty(max(_size(chunk, M) for chunk in part))

    def __call__(self, images: slice, rows: slice) -> Tensor:
        size = _size(Chunk(images, rows), self.M)
        return self.memory[:size].view(images.stop - images.start, rows.stop - rows.start, self.M)


def _size(chunk: Chunk, M: int) -> int:
    return int((chunk.images.stop - chunk.images.start) * (chunk.rows.stop - chunk.rows.start) * M)


@functools.lru_cache(maxsize=64)
def _plan(B: int, N: int, M: int, threads: int) -> tuple[tuple[Chunk, ...], ...]:
    """Return the chunks of B maps of N x M, as even as can be, in one part a thread."""
    per_thread = -(-B * N * M // threads)
    most = max(M, min(CHUNK_SCORES, per_thread))
    if most >= N * M:
        step = most // (N * M)
        chunks = [Chunk(slice(b, min(b + step, B)), slice(0, N)) for b in range(0, B, step)]
    else:
        count = -(-N * M // most)
        step = -(-N // count)
        chunks = [Chunk(slice(b, b + 1), slice(n, min(n + step, N))) for b in range(B) for n in range(0, N, step)]
    count = min(threads, len(chunks))
    cuts = [len(chunks) * i // count for i in range(count + 1)]
    return tuple(tuple(chunks[start:stop]) for start, stop in zip(cuts, cuts[1:], strict=False))


def _parts(B: int, N: int, M: int) -> tuple[tuple[Chunk, ...], ...]:
    return _plan(B, N, M, torch.get_num_threads())


def _share(work: Callable[[Sequence[Chunk]], None], parts: Sequence[Sequence[Chunk]]) -> None:
    """Do `work` on every part, each in a thread of its own, whose products then take one thread."""
    threads = torch.get_num_threads()
    if len(parts) == 1 or threads == 1:
        for part in parts:
            work(part)
        return
    inference = torch.is_inference_mode_enabled()  # modes are a thread's own

    def alone(part: Sequence[Chunk]) -> None:
        with torch.inference_mode(inference), torch.no_grad():
            work(part)

    for future in [_pool(threads, os.getpid()).submit(alone, part) for part in parts]:
        future.result()


@functools.lru_cache(maxsize=1)
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Return `threads` threads of this process in which PyTorch uses one thread."""
    ready = threading.Barrier(threads + 1)

    def single() -> None:
        torch.get_num_threads()  # a thread's first look takes the process's number, over what it was set to before
        torch.set_num_threads(1)  # this thread's own; others keep theirs
        ready.wait()

    pool = ThreadPoolExecutor(threads, thread_name_prefix="sagan_fast", initializer=single)
    for _ in range(threads):
        pool.submit(int)
    ready.wait()
    torch.set_num_threads(threads)  # what threads that are still to come begin with
    return pool
