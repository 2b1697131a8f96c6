"""The kernel report as its users run it, and what every shipped kernel must be like.

The report runs in a process of its own: here kernels are imported for the interpreter, which makes no machine code.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.kernel_report import (
    BEGIN,
    END,
    LAUNCH_COLUMNS,
    block_rows,
    block_table,
    read_measured,
    short_config,
    write_markdown,
)
from benchmarks.machine import MACHINES
from benchmarks.records import Record, append, environment
from benchmarks.shapes import STANDARD_SHAPES
from benchmarks.shipped import INFERENCE, block_launches

ROOT = Path(__file__).parents[2]
KEYS = {
    "kernel", "dtype", "config", "arch", "registers", "stack", "spills", "smem", "hgmma", "hmma", "mufu", "utchmma",
    "ldg128", "resident_blocks", "resident_limit", "shape", "pass", "flops", "exps", "bytes", "limit_us", "limit_binds",
}  # fmt: skip


def report(*arguments, interpret="0"):
    environment = {**os.environ, "TRITON_INTERPRET": interpret}
    command = [sys.executable, "-m", "benchmarks.kernel_report", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def json_of(path, *arguments, **keywords):
    done = report("--json", str(path), *arguments, **keywords)
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text()), done.stdout


@pytest.mark.slow
def test_a_handful_of_kernels(tmp_path):
    """One block for Hopper, even where the environment asks for the interpreter: contract of the rows, table, gate."""
    rows, text = json_of(
        tmp_path / "rows.json", "--arch", "90", "--dtype", "bf16", "--only", "unpooled-32x32", interpret="1"
    )
    assert all(row.keys() >= KEYS for row in rows)
    assert {row["pass"] for row in rows} == {"inference", "forward", "backward", "functional"}
    assert {row["kernel"] for row in rows} >= {"projection_fwd", "self_attention_fwd", "attention_bwd_dkv"}
    for row in rows:
        check(row)
    assert "forward+backward" in text and "not measured" in text
    for row in rows:
        limits = MACHINES[90].limit_us(row["flops"], row["exps"], row["bytes"], "bf16")
        assert (row["limit_us"], row["limit_binds"]) == (pytest.approx(limits[0], abs=1e-3), limits[1])


def check(row):
    """What the machine code of every shipped kernel must be like."""
    where = {key: row[key] for key in ("kernel", "dtype", "config", "arch", "shape", "pass")}
    assert row["spills"] == row["stack"] == 0, where
    assert row["smem"] <= row["smem_cap"] and row["resident_blocks"] >= 1 and row["limit_us"] > 0, where
    if row["exps"]:
        assert row["mufu"] > 0, where
    through_o = row["kernel"] == "self_attention_bwd_preprocess" and "unpooled" not in row["shape"]
    if row["exps"] or row["kernel"] == "projection_fwd" or through_o:
        used = {"sm_80": row["hmma"], "sm_90": row["hgmma"], "sm_100": row["utchmma"] + row["hmma"]}
        assert (used[row["arch"]] > 0) == (row["dtype"] != "fp32"), where
    if "sweep" in row["kernel"]:
        assert row["ldg128"] > 0, where


@pytest.mark.slow
def test_nothing_found_is_an_error():
    done = report("--only", "no such kernel")
    assert done.returncode == 2 and done.stderr == "kernel_report: no launch matches --only 'no such kernel'\n"


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    rows, _ = json_of(tmp_path_factory.mktemp("report") / "rows.json")
    return rows


@pytest.mark.slow
def test_every_shipped_kernel(everything):
    assert {row["arch"] for row in everything} == {"sm_80", "sm_90", "sm_100"}
    assert {row["dtype"] for row in everything} >= {"fp32", "tf32", "fp16", "bf16"}
    assert {row["shape"] for row in everything} >= {"large-128x128-C64", "official-G-32x32-C256"}
    assert {row["kernel"] for row in everything} >= {"self_attention_bwd_preprocess", "projection_fwd"}
    for row in everything:
        check(row)


@pytest.mark.parametrize("shape", [s for s in STANDARD_SHAPES if s.H == 64], ids=lambda s: s.name)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_on_large_maps_the_launches_need_little_more_than_the_block(shape, dtype):
    """Forward, what passes between the launches included, the limits add up to at most 1.3 times the block's."""
    plans = [one.plan for one in block_launches(shape, dtype, 90) if one.part == INFERENCE]
    limits = [MACHINES[90].limit_us(p.flops, p.exps, p.bytes_read + p.bytes_written, dtype)[0] for p in plans]
    limit, _ = MACHINES[90].limit_us(shape.flops(), shape.exps(), shape.bytes(dtype), dtype)
    assert len(limits) == 2 and limit < sum(limits) <= 1.3 * limit


def needed(part, limit_us, shape="unpooled-32x32-C64"):
    """As much of a launch's row as makes a block's: neither kernel nor machine code matter."""
    return {"shape": shape, "dtype": "bf16", "arch": "sm_90", "pass": part, "limit_us": limit_us}


def test_a_block_is_the_launches_of_a_pass_beside_its_limit():
    shape = next(s for s in STANDARD_SHAPES if s.name == "unpooled-32x32-C64")
    rows = [needed("inference", 3.0), needed("inference", 5.0), needed("forward", 7.0), needed("inference", 9.0, "x")]
    limit, binds = MACHINES[90].limit_us(shape.flops(), shape.exps(), shape.bytes("bf16"), "bf16")
    (forward,) = block_rows(rows, {(90, shape.name, "bf16", "forward"): 4 * limit})  # the backward is not there
    assert (forward["launches"], forward["launches' limits us"], forward["pass"]) == (2, 8.0, "forward")
    assert forward["limit us"] == pytest.approx(limit, abs=1e-3) and forward["limit is"] == binds
    assert forward["measured us"] == 4 * limit and forward["of limit"] == pytest.approx(0.25)
    _, both = block_rows([*rows, needed("backward", 2.0)], {(80, shape.name, "bf16", "forward+backward"): 1.0})
    assert (both["launches"], both["launches' limits us"]) == (2, 9.0)
    assert both["measured us"] == both["of limit"] == "not measured"
    assert block_table([both]).splitlines()[-1].endswith("not measured  not measured")
    assert block_table([]) == ""


def test_measured_times_are_those_of_our_block_on_the_very_chip(tmp_path, monkeypatch):
    """From records as the harness writes them, both modes, two methods, two devices and a peer among them."""

    def measured(device, time, provider="triton", **changes):
        monkeypatch.setattr("benchmarks.records.device_name", lambda _: device)
        environment.cache_clear()
        place = dict(benchmark="attention", shape="s", dtype="bf16", mode="forward", method="graph") | changes
        append(Record(provider=provider, p50_us=time, **place), "cuda", tmp_path)

    measured("NVIDIA H200", 12.5)
    measured("NVIDIA H200", 40.0, mode="forward+backward")
    measured("NVIDIA H200", 99.0, method="eager")
    measured("NVIDIA H200", 98.0, provider="sdpa-cudnn")
    measured("NVIDIA H200", None, shape="t")
    measured("NVIDIA H200", 97.0, benchmark="gate")
    measured("NVIDIA A100-SXM4-80GB", 30.0)
    measured("NVIDIA H100 80GB HBM3", 96.0)  # no chip that limits are known of
    environment.cache_clear()
    assert read_measured(tmp_path) == {
        (90, "s", "bf16", "forward"): 12.5,
        (90, "s", "bf16", "forward+backward"): 40.0,
        (80, "s", "bf16", "forward"): 30.0,
    }
    assert read_measured(tmp_path / "nowhere") == {}


def test_markdown_goes_between_its_markers(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    block = {"shape": "s", "dtype": "bf16", "arch": "sm_90"}
    row = {**dict.fromkeys(LAUNCH_COLUMNS, 1), "kernel": "k", "config": "Config(BLOCK_N=64)", "pass": "forward"}
    write_markdown(page, [row, {**row, "kernel": "other", "pass": "functional"}], [block])
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| s | bf16 | sm_90 |" in text and "| k | 1 | N64 |" in text and "other" not in text
    page.write_text("no markers")
    with pytest.raises(ValueError, match="must hold these lines once each"):
        write_markdown(page, [row], [block])


def test_configs_are_shortened():
    off = "maxnreg=None, sum_by_product=False"
    assert short_config(f"AttentionConfig(BLOCK_N=64, BLOCK_M=32, num_warps=4, {off})") == "N64 M32 warps4"
    assert short_config("C(num_warps=8, maxnreg=255, sum_by_product=True)") == "warps8 maxnreg255 sum_by_product"
