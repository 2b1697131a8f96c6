"""Chunks of the N x M map, and the threads that share them: what attention in PyTorch's products is cut into."""

import functools
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

CHUNK_SCORES = 2**19
"""Scores of a chunk: 2 MB, small beside the cache that the threads share. 2**17 to 2**20 are equally fast."""

GPU_CHUNK_SCORES = 2**24
"""The same on a GPU, where each product of a chunk must fill it."""


class Chunk(NamedTuple):
    """Rows `rows` of the maps of images `images`."""

    images: slice
    rows: slice


class Buffer:
    """Memory for the largest chunk of a part, handed out as (images, rows, M) with a gap behind each row.

    Rows an odd number of cache lines apart: where M is a power of two, all rows without a gap would compete for the
    same few places of the caches. What that costs: docs/log.md, "Attention on the CPU".
    """

    def __init__(self, like: Tensor, part: Sequence[Chunk], M: int) -> None:
        line = 64 // like.element_size()
        self.M, self.step = M, (-(-M // line) | 1) * line
        self.memory = like.new_empty(max(size(chunk, self.step) for chunk in part))

    def __call__(self, images: slice, rows: slice) -> Tensor:
        shape = (images.stop - images.start, rows.stop - rows.start, self.M)
        return self.memory.as_strided(shape, (shape[1] * self.step, self.step, 1))


def size(chunk: Chunk, M: int) -> int:
    """Return the number of scores of `chunk`."""
    return int((chunk.images.stop - chunk.images.start) * (chunk.rows.stop - chunk.rows.start) * M)


@functools.lru_cache(maxsize=64)
def plan(B: int, N: int, M: int, threads: int, scores: int) -> tuple[tuple[Chunk, ...], ...]:
    """Return the chunks of B maps of N x M, up to `scores` each and as even as can be, in one part a thread."""
    per_thread = -(-B * N * M // threads)
    most = max(M, min(scores, per_thread))
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


def parts_of(q: Tensor, M: int) -> tuple[tuple[Chunk, ...], ...]:
    """Return the parts of the maps of `q` (B, N, D_QK) and M keys, one for each thread that computes on its device."""
    B, N, _ = q.shape
    on_cpu = q.device.type == "cpu"
    return plan(B, N, M, torch.get_num_threads() if on_cpu else 1, CHUNK_SCORES if on_cpu else GPU_CHUNK_SCORES)


class KeySums:
    """Sums over queries, (B, D, M), for some widths D: each part adds to its own, since two may share an image."""

    def __init__(self, like: Tensor, parts: Sequence[Sequence[Chunk]], B: int, M: int, widths: Sequence[int]) -> None:
        self.parts = list(parts)
        self.images = [slice(part[0].images.start, part[-1].images.stop) for part in parts]
        self.sums = [
            [like.new_zeros(images.stop - images.start, width, M) for width in widths] for images in self.images
        ]
        self.shapes = [(B, width, M) for width in widths]

    def of(self, part: Sequence[Chunk], images: slice) -> list[Tensor]:
        """Return the sums that `part` adds to for `images`."""
        i = self.parts.index(part)
        first = self.images[i].start
        return [total[images.start - first : images.stop - first] for total in self.sums[i]]

    def total(self) -> list[Tensor]:
        """Return the sums of all parts, transposed: (B, M, D)."""
        totals = [self.sums[0][0].new_zeros(shape) for shape in self.shapes]
        for images, sums in zip(self.images, self.sums, strict=True):
            for total, added in zip(totals, sums, strict=True):
                total[images] += added
        return [total.transpose(1, 2) for total in totals]


def share(work: Callable[[Sequence[Chunk]], None], parts: Sequence[Sequence[Chunk]]) -> None:
    """Do `work` on every part, each in a thread of its own, whose products then take one thread."""
    threads = torch.get_num_threads()
    if len(parts) == 1 or threads == 1:
        for part in parts:
            work(part)
        return
    inference = torch.is_inference_mode_enabled()  # modes are a thread's own

    def alone(part: Sequence[Chunk]) -> None:
        with torch.inference_mode(inference), torch.no_grad(), forward_ad._set_fwd_grad_enabled(False):
            work(part)

    for future in [pool(threads, os.getpid()).submit(alone, part) for part in parts]:
        future.result()


@functools.lru_cache(maxsize=1)
def pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Return `threads` threads of this process in which PyTorch uses one thread."""
    ready = threading.Barrier(threads + 1)

    def single() -> None:
        torch.get_num_threads()  # a thread's first look takes the process's number, over what it was set to before
        torch.set_num_threads(1)  # this thread's own; others keep theirs
        ready.wait()

    executor = ThreadPoolExecutor(threads, thread_name_prefix="sagan_fast", initializer=single)
    for _ in range(threads):
        executor.submit(int)
    ready.wait()
    torch.set_num_threads(threads)  # what threads that are still to come begin with
    return executor
