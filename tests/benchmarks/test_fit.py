"""The search by compiling takes what fits, with room for two where it can, and writes it."""

import pytest

from benchmarks import fit
from benchmarks.tune import tensor_cores_pay
from sagan_fast.kernels import configs
from sagan_fast.kernels.configs import LaunchConfig

KEY = ("attention_bwd_dq", "86", "bf16", "32x64", "large")
FITS = {"registers": 128, "stack": 0, "spills": 0, "smem": 40000, "tmem": 0, "instructions": 1000}


@pytest.fixture
def compiled(monkeypatch):
    """Let a table say what each config compiles to; what is not in it spills. Return the table."""
    table = {}

    def look_up(uses):
        return {**FITS, **table.get(uses, {"stack": 8})}

    monkeypatch.setattr(fit, "compile_plan", lambda plan, arch: plan.config)
    monkeypatch.setattr(fit, "resources", look_up)
    return table


def test_tensor_cores_pay_where_they_are_over_three_times_as_fast():
    def pays(arch, precision="fp32"):
        return tensor_cores_pay(("attention_fwd", arch, precision, "32x64", "large"))

    assert pays("80") and pays("90") and pays("100")
    assert not pays("86") and not pays("120") and not pays("gfx") and not pays("90", "bf16")


def test_launches_of_a_row_run_its_kernel_with_its_config():
    config = LaunchConfig(BLOCK_N=64, BLOCK_M=32, num_warps=4)
    with fit.shipped(KEY, config):
        plans = fit.plans_of(KEY, 86)
    assert len(plans) == 4 and {plan.name for plan in plans} == {"attention_bwd_dq"}
    assert {plan.config for plan in plans} == {str(config)}
    assert KEY not in configs._configs()


def test_a_row_that_fits_with_room_for_two_stays(compiled):
    given = LaunchConfig(BLOCK_N=128, BLOCK_M=64, num_warps=8)
    compiled[str(given)] = {}
    assert fit.fit(KEY, given) == (given, 1000 * 8 / (128 * 64))


def test_without_room_for_two_a_cheaper_one_is_searched(compiled):
    given = LaunchConfig(BLOCK_N=128, BLOCK_M=64, num_warps=8)
    compiled[str(given)] = {"smem": 60000}
    smaller = LaunchConfig(BLOCK_N=64, BLOCK_M=64, num_warps=4)
    compiled[str(smaller)] = {"instructions": 1100}
    larger = LaunchConfig(BLOCK_N=128, BLOCK_M=128, num_warps=8)
    compiled[str(larger)] = {"smem": 102000}  # over what a program may have
    assert fit.fit(KEY, given) == (smaller, 1100 * 4 / (64 * 64))
    compiled[str(smaller)] = {"instructions": 3000}
    assert fit.fit(KEY, given) == (given, 1.25 * 1000 * 8 / (128 * 64))


def test_where_nothing_fits_nothing_is_written_and_the_status_says_so(compiled, monkeypatch, tmp_path, capsys):
    path = tmp_path / "configs.csv"
    path.write_text(configs.FILE.read_text())
    monkeypatch.setattr(configs, "FILE", path)
    rows = dict(configs._configs())
    monkeypatch.setattr(configs, "_configs", lambda: rows)
    command = ["--arch", "86", "--dtype", "bf16", "--kernel", "attention_bwd_dq", "--width", "32x64"]
    assert fit.main(command) == 1
    assert path.read_text() == configs.FILE.read_text() and "(None)" in capsys.readouterr().out
    monkeypatch.setattr(fit, "resources", lambda uses: {**FITS, "stack": 0 if "BLOCK_M=32" in uses else 8})
    assert fit.main(command) == 0
    written = {key: row for row in configs.read_rows(path) for key in row.keys if key[:2] == KEY[:2]}
    assert written and {row.config.BLOCK_M for row in written.values()} == {32}
    assert {row.origin for row in written.values()} == {"from the machine code"}
