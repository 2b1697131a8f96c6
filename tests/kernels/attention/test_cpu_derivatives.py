"""Tangents and second gradients in chunks: every way of cutting the maps gives the reference's values."""

import pytest
import torch

from sagan_fast.kernels.attention import chunks, cpu, reference
from sagan_fast.kernels.attention.cpu_derivatives import attention_second, attention_tangent
from shared_by_tests import randn

SHAPES = [(2, 40, 24, 8, 16), (5, 13, 12, 3, 7), (1, 5, 1, 1, 1)]  # B, N, M, D_QK, D_V


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("chunk_scores", [1, 200, 10**6])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_cut_gives_the_same(shape, chunk_scores, threads, generator, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_SCORES", chunk_scores)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        B, N, M, D_QK, D_V = shape
        sizes = ((B, N, D_QK), (B, M, D_QK), (B, M, D_V), (B, N, D_V))
        q, k, v, d_out, *tangents = (randn(*size, generator=generator) for size in (*sizes, *sizes[:3]))
        q = q.transpose(1, 2).contiguous().transpose(1, 2)  # as a view of an NCHW map
        saved = cpu.attention_fwd(q, k, v, 0.7)
        found = attention_second(d_out, q, k, v, *saved, *tangents, 0.7)
        tangent, _ = attention_tangent(q, k, v, *saved, *tangents, 0.7)
    finally:
        torch.set_num_threads(before)
    truth = reference.attention_second(d_out, q, k, v, *tangents, 0.7)
    torch.testing.assert_close(found, truth)
    torch.testing.assert_close(tangent, reference.attention_tangent(q, k, v, *tangents, 0.7))
