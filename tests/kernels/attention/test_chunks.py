"""How maps are cut into chunks, and the threads that share them."""

import os
import threading

import pytest
import torch

from sagan_fast.kernels.attention import chunks
from sagan_fast.ops.attention import on_the_cpu
from shared_by_tests import randn


@pytest.fixture(params=[1, 2, 3], ids="{} threads".format)
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def inputs(generator):
    """Return q, k and v of four images."""
    return [randn(4, *size, generator=generator).float() for size in ((96, 8), (64, 8), (64, 32))]


@pytest.mark.parametrize(("B", "N", "M"), [(1, 1, 1), (7, 30, 10), (2, 4096, 1024), (1, 1000, 3000)])
def test_the_plan_covers_every_row_once(B, N, M):
    parts = chunks.plan(B, N, M, 3, chunks.CHUNK_SCORES)
    rows = torch.zeros(B, N)
    for images, cut in (chunk for part in parts for chunk in part):
        rows[images, cut] += 1
    assert rows.eq(1).all() and len(parts) <= 3
    assert all(chunks.size(b, M) <= max(M, chunks.CHUNK_SCORES) for part in parts for b in part)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("M", [1, 16, 100, 1024, 4096])
def test_rows_of_a_buffer_are_an_odd_number_of_cache_lines_apart(M, dtype):
    part = [chunks.Chunk(slice(0, 2), slice(0, 3)), chunks.Chunk(slice(2, 3), slice(0, 3))]
    buffer = chunks.Buffer(torch.empty(0, dtype=dtype), part, M)
    for images, rows in part:
        found = buffer(images, rows)
        lines, rest = divmod(found.stride(1) * found.element_size(), 64)
        assert found.shape == (images.stop - images.start, 3, M) and found.stride(2) == 1
        assert rest == 0 and lines % 2 == 1 and found.stride(1) >= M and found.stride(0) == 3 * found.stride(1)


def test_the_number_of_threads_of_everybody_else_stays(generator, threads):
    q, k, v = inputs(generator)
    chunks.CHUNK_SCORES, before = 4096, chunks.CHUNK_SCORES
    try:
        on_the_cpu(q, k, v)
    finally:
        chunks.CHUNK_SCORES = before
    seen = []
    other = threading.Thread(target=lambda: seen.append((torch.ones(1) + 1, torch.get_num_threads())[1]))
    other.start(), other.join()
    assert torch.get_num_threads() == threads and seen == [threads]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_makes_threads_of_its_own(generator):
    q, k, v = inputs(generator)
    truth = on_the_cpu(q, k, v)
    context = torch.multiprocessing.get_context("fork")
    results = context.SimpleQueue()

    def child():
        torch.set_num_threads(1)  # PyTorch's own OpenMP threads did not come along
        chunks.share(lambda part: None, [(), ()])
        results.put(torch.equal(on_the_cpu(q, k, v), truth))

    process = context.Process(target=child)
    process.start()
    process.join(60)
    assert process.exitcode == 0 and results.get()


def test_sums_over_queries_of_parts_that_share_an_image():
    parts = chunks.plan(3, 10, 4, 2, 20)
    sums = chunks.KeySums(torch.empty(0), parts, 3, 4, (2, 5))
    for part in parts:
        for images, rows in part:
            for total in sums.of(part, images):
                total += rows.stop - rows.start
    assert all(torch.equal(total, torch.full_like(total, 10)) for total in sums.total())
    assert [total.shape for total in sums.total()] == [(3, 4, 2), (3, 4, 5)]


def test_each_thread_computes_alone():
    """A thread's first product must not give it the process's number of threads back."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        chunks.pool.cache_clear()

        def threads() -> int:
            torch.ones(64, 64) @ torch.ones(64, 64)
            return torch.get_num_threads()

        futures = [chunks.pool(2, os.getpid()).submit(threads) for _ in range(4)]
        assert [future.result() for future in futures] == [1, 1, 1, 1] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
        chunks.pool.cache_clear()
