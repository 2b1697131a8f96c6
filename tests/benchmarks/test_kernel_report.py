"""The kernel report as its users run it, and what every shipped kernel must be like.

The report runs in a process of its own: here kernels are imported for the interpreter, which makes no machine code.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.kernel_report import BEGIN, END, block_table, read_measured, short_config, write_markdown
from benchmarks.machine import MACHINES
from benchmarks.records import Record, append, environment
from benchmarks.shapes import STANDARD_SHAPES

ROOT = Path(__file__).parents[2]
KEYS = {
    "kernel", "dtype", "config", "arch", "registers", "stack", "spills", "smem", "hgmma", "hmma", "mufu", "utchmma",
    "ldg128", "resident_blocks", "shape", "pass", "modelled_overlapped_us", "modelled_serial_us", "limit_us", "binds",
}  # fmt: skip


def report(*arguments, interpret="0"):
    environment = {**os.environ, "TRITON_INTERPRET": interpret}
    command = [sys.executable, "-m", "benchmarks.kernel_report", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def json_of(path, *arguments, **keywords):
    done = report("--json", str(path), *arguments, **keywords)
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text()), done.stdout


def test_a_handful_of_kernels(tmp_path):
    """One block for Hopper, even where the environment asks for the interpreter: contract of the rows, table, gate."""
    rows, text = json_of(
        tmp_path / "rows.json", "--arch", "90", "--dtype", "bf16", "--only", "unpooled-32x32", "--detail", interpret="1"
    )
    assert all(row.keys() >= KEYS for row in rows)
    assert {row["pass"] for row in rows} == {"inference", "forward", "backward", "functional"}
    assert {row["kernel"] for row in rows} >= {"projection_fwd", "self_attention_fwd", "attention_bwd_dkv"}
    for row in rows:
        check(row)
    assert "nothing here was measured" in text and "not measured" in text
    assert "forward+backward" in text and "outside loops" in text


def check(row):
    """What the machine code of every shipped kernel must be like."""
    where = {key: row[key] for key in ("kernel", "dtype", "config", "arch", "shape", "pass")}
    assert row["spills"] == row["stack"] == 0, where
    assert row["smem"] <= row["smem_cap"] and row["resident_blocks"] >= 1, where
    assert row["modelled_overlapped_us"] is not None, (where, row["notes"])
    assert not any("counted once" in note or "taken as whole" in note for note in row["notes"]), (where, row["notes"])
    if row["modelled_serial_us"] is None:
        assert "spectral_norm" in row["kernel"] and "only bytes" in row["notes"][0], where  # which branch runs is data
    else:
        assert row["modelled_overlapped_us"] <= row["modelled_resident_us"] * 1.001 <= row["modelled_serial_us"] * 1.002
    if row["flops_done_over_needed"] and row["dtype"] != "fp32":
        used = {"sm_80": row["hmma"], "sm_90": row["hgmma"], "sm_100": row["utchmma"] + row["hmma"]}
        assert used[row["arch"]] > 0, where
    if "sweep" in row["kernel"]:
        assert row["ldg128"] > 0, where


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
    for row in everything:
        check(row)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize(
    "shape", ["feat64-G-64x64-C128", "feat64-D-64x64-C64", "biggan-G-64x64-C192", "biggan-D-64x64-C96"]
)
def test_large_maps_are_near_the_limit(everything, shape, dtype):
    """Modelled with all pipes overlapped, forward takes at most 1.3 times what the block needs."""
    block = next(s for s in STANDARD_SHAPES if s.name == shape)
    limit, _ = MACHINES[90].limit_us(block.flops(), block.exps(), block.bytes(dtype), dtype)
    rows = [r for r in everything if (r["shape"], r["dtype"], r["arch"]) == (shape, dtype, "sm_90")]
    forward = [r["modelled_overlapped_us"] for r in rows if r["pass"] == "inference"]
    assert len(forward) == 2 and sum(forward) <= 1.3 * limit


BLOCK = {
    "shape": "s", "dtype": "bf16", "arch": "sm_90", "pass": "forward", "launches": 2, "library_us": 0.0,
    "modelled_overlapped_us": 2.0, "modelled_resident_us": 3.0, "modelled_serial_us": 4.0, "limit_us": 1.0,
    "limit_binds": "mufu", "over_limit": 2.0, "binds": "l2 of k", "measured_us": None,
}  # fmt: skip


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
    assert block_table([BLOCK]).splitlines()[-1].endswith("not measured")
    assert block_table([{**BLOCK, "measured_us": 12.5}]).splitlines()[-1].endswith("12.50")


def test_markdown_goes_between_its_markers(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    write_markdown(page, [BLOCK])
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "not measured**" in text and "| s | bf16 | sm_90 |" in text
    page.write_text("no markers")
    with pytest.raises(SystemExit, match="must hold the lines"):
        write_markdown(page, [BLOCK])


def test_configs_are_shortened():
    assert short_config("AttentionConfig(BLOCK_N=64, BLOCK_M=32, num_warps=4)") == "N64 M32 warps4"
