"""The candidates of the tuner, and what it says where there is no GPU."""

import pytest
import torch

pytest.importorskip("benchmarks.shapes")

from benchmarks.tune import KERNELS, agrees, candidates, main  # noqa: E402


def test_every_kernel_has_candidates_without_repeats():
    for kernel in KERNELS:
        found = list(candidates(kernel))
        assert len(found) == len(set(found)) >= 36


def test_a_dry_run_lists_them_and_a_real_one_needs_a_gpu(capsys):
    assert main(["--dry-run", "--kernel", "dq"]) == 0
    assert capsys.readouterr().out.count("dq AttentionConfig(") == len(list(candidates("dq")))
    if not torch.cuda.is_available():
        assert main([]) == 1
        assert "needs a CUDA device" in capsys.readouterr().err


def test_a_wrong_result_does_not_agree():
    right = (torch.randn(100), None, torch.zeros(3, dtype=torch.uint8))
    wrong = (right[0] * 1.1, *right[1:])
    assert agrees(right, right, "bf16") and not agrees(wrong, right, "bf16")
