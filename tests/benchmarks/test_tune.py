"""The candidates of the tuner, what it writes, and what it says where there is no GPU."""

import time

import pytest
import torch

pytest.importorskip("benchmarks.shapes")

from benchmarks import tune as tuner  # noqa: E402
from benchmarks.shapes import BLOCK_SHAPES  # noqa: E402
from benchmarks.tune import KERNELS, agrees, candidates, main, rows, tune, write  # noqa: E402
from sagan_fast.kernels import configs  # noqa: E402

ALL = rows(90, "bf16", KERNELS, BLOCK_SHAPES)


def test_every_kernel_and_shape_has_a_row_and_every_row_candidates_without_repeats():
    assert {row.kernel for row in ALL} == set(KERNELS) and len({row.key for row in ALL}) == len(ALL)
    for kernel in KERNELS:
        assert sorted(s.name for row in ALL if row.kernel == kernel for s in row.shapes) == sorted(
            s.name for s in BLOCK_SHAPES
        )
    for row in ALL:
        found = list(candidates(row.key, row.shipped))
        assert row.shipped not in found and len(found) == len(set(found)) >= 20
    forward = next(row for row in ALL if row.kernel == "attention_fwd")
    assert {config.maxnreg for config in candidates(forward.key, forward.shipped)} == {None, 128, 168, 255}


def test_a_dry_run_lists_them_and_a_real_one_needs_a_gpu(capsys):
    assert main(["--dry-run", "--kernel", "attention_bwd_dq"]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = [row for row in ALL if row.kernel == "attention_bwd_dq"]
    assert len(lines) == sum(len(list(candidates(row.key, row.shipped))) for row in found)
    assert all(line.startswith("attention_bwd_dq 90 bf16 ") for line in lines)
    if not torch.cuda.is_available():
        assert main([]) == 2
        assert "needs a CUDA device" in capsys.readouterr().err


def test_a_wrong_result_does_not_agree():
    right = (torch.randn(100), None, torch.zeros(3, dtype=torch.uint8))
    wrong = (right[0] * 1.1, *right[1:])
    assert agrees(right, right, "bf16") and not agrees(wrong, right, "bf16")


def fake(kernel, shape, dtype):
    """A kernel that takes a second, half of it with three stages, is wrong with 4 warps and refused with one stage."""

    def run(config):
        if config is not None and config.num_stages == 1:
            raise RuntimeError("out of resource")
        run.time = 0.5 if config is not None and config.num_stages == 3 else 1.0
        run.time /= 1 + (config is not None and config.num_warps == 4)
        fake.last = run.time
        return (torch.full((3,), 2.0 if config is not None and config.num_warps == 4 else 1.0),)

    return run


def timed(call):
    call()
    return fake.last


def test_the_fastest_that_is_right_is_written_and_launched(tmp_path, monkeypatch):
    row = next(row for row in ALL if row.kernel == "attention_bwd_dq" and row.key[3] == "16x64")
    assert row.shipped.num_warps == 8 and row.shipped.num_stages == 2
    config, ratio, measured = tune(row, "bf16", time.monotonic() + 60, fake, timed)
    assert (config.num_warps, config.num_stages, ratio) == (8, 3, pytest.approx(0.5))
    assert measured == len(list(candidates(row.key, row.shipped)))
    assert tune(row, "bf16", time.monotonic() - 1, fake, timed) == (row.shipped, 1.0, 0)

    path = tmp_path / "configs.csv"
    path.write_text(configs.FILE.read_text())
    write(path, row.key, config, "measured on a card, today")
    before, after = ({key: one for one in configs.read_rows(p) for key in one.keys} for p in (configs.FILE, path))
    assert after.keys() == before.keys() and after[row.key].origin == "measured on a card, today"
    assert [key for key in after if after[key].config != before[key].config] == [row.key]
    caches = (configs._configs, configs.lookup)
    monkeypatch.setattr(configs, "FILE", path)
    try:
        for cache in caches:
            cache.cache_clear()
        D_QK, D_V, N = row.shapes[0].d_qk, row.shapes[0].d_v, row.shapes[0].N
        for precision in ("bf16", "fp16"):
            assert configs.lookup("attention_bwd_dq", 90, precision, D_QK, D_V, N) == config
        assert configs.lookup("attention_bwd_dq", 80, "bf16", D_QK, D_V, N).num_stages == 2
        assert tuner.rows(90, "bf16", ["attention_bwd_dq"], row.shapes)[0].shipped == config
    finally:
        monkeypatch.undo()
        for cache in caches:
            cache.cache_clear()
