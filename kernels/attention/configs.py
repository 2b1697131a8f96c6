from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AttentionConfig:
    BLOCK_N: int
    BLOCK_M: int
    BLOCK_C: int
    num_warps: int
    num_stages: int


def lookup_forward(arch, precision, D_QK, D_V, N, M):
    return AttentionConfig(64, 64, 64, 4, 3)


def lookup_dkv(arch, precision, D_QK, D_V, N, M):
    return AttentionConfig(64, 64, 64, 4, 3)


def lookup_dq(arch, precision, D_QK, D_V, N, M):
    return AttentionConfig(64, 64, 64, 4, 3)


def lookup_delta(arch, precision, D_V):
    return AttentionConfig(64, 64, 64, 4, 3)
