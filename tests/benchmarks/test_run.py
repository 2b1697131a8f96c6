import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import harness
from benchmarks.harness import DeviceLost, Provider
from benchmarks.journal import Journal
from benchmarks.run import CUDA, main


def test_a_dry_run_runs_our_kernels_and_records_nothing(tmp_path, capsys):
    assert main(["--dry-run", "--out", str(tmp_path), "--only", "gate official-D"]) == 0
    out = capsys.readouterr().out
    assert "benchmarks: gate: 2 cases; nothing recorded" in out and not list(tmp_path.iterdir())
    assert "wrong" not in out and "cannot run" not in out and out.count("triton") == 2
    assert all(f"benchmarks: {name}: 0 cases" in out for name in CUDA if name != "gate")


@pytest.mark.slow
def test_the_dry_run_walks_every_case_of_a_gpu(tmp_path, capsys):
    assert main(["--dry-run", "--out", str(tmp_path), "--minutes", "30"]) == 0
    out = capsys.readouterr().out
    counts = dict(re.findall(r"benchmarks: (\S+): (\d+) cases; nothing recorded", out))
    assert {name: int(count) for name, count in counts.items()} == {
        "gate": 18, "attention": 18, "spectral_norm": 2, "attention-compiled": 18, "train_step": 1,
        "sweep": 18, "dtypes": 16,
    }  # fmt: skip
    lost = {line.split()[0] for line in out.splitlines() if "cannot run" in line}
    assert lost <= {"sdpa-cudnn", "sdpa-efficient", "flex", "flash-attention-4", "xformers"}, "what a CPU has not"
    assert "wrong" not in out and torch.compile.__module__ == "torch"


def test_what_a_gpu_is_given_is_listed_without_one():
    """In a process without the tests' own torch.empty, on which the meta device does not work."""
    listing = """if True:
        from benchmarks.run import CUDA
        for name, part in CUDA.items():
            cases = list(part())
            print(name, len(cases), *dict.fromkeys(p.name for case in cases for p in case.providers))
    """
    done = subprocess.run(
        [sys.executable, "-c", listing], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0, done.stderr
    parts = {name: (int(count), who) for name, count, *who in map(str.split, done.stdout.splitlines())}
    assert list(parts) == list(CUDA) and parts["gate"] == (18, ["eager", "triton"]) and parts["dtypes"][0] == 48
    assert {"sdpa-cudnn", "flex", "xformers", "flash-attention-4"} <= set(parts["attention-compiled"][1])
    assert "parametrization-compiled" in parts["spectral_norm"][1]


def test_a_part_records_as_it_goes_and_goes_on_where_it_stopped(tmp_path, capsys, monkeypatch):
    import benchmarks.run as run
    from benchmarks.bench_spectral_norm import SMALL, cases

    monkeypatch.setattr(run, "CPU", {"norm": lambda: cases("cpu", SMALL[:5])})
    args = ["--device", "cpu", "--out", str(tmp_path), "--rounds", "1", "--part", "norm"]
    journal = tmp_path / "journal"
    assert main([*args, "--only", "none such", "--journal", str(journal)]) == 0
    assert "norm: 0 cases" in capsys.readouterr().out
    Journal(journal).lose("spectral_norm 5-matrices fp32 forward", "biggan", "it crashed")
    assert main([*args, "--journal", str(journal)]) == 0
    assert "norm: 2 cases" in capsys.readouterr().out
    records = [json.loads(line) for line in (tmp_path / "cpu.jsonl").read_text().splitlines()]
    assert [r["shape"] for r in records[:3]] == ["copy 512 MiB", "2**20 exponentials", "product 2048"]
    records = records[3:]
    assert {r["provider"] for r in records} == {"parametrization", "legacy", "biggan", "function", "group"}
    assert all(r["bound_us"] > 0 and r["bound_by"] == "bytes" for r in records)
    lost = [r for r in records if r["error"]]
    assert [(r["provider"], r["error"]) for r in lost] == [("biggan", "cannot run: it crashed")]
    assert all(r["p50_us"] > 0 for r in records if not r["error"])
    assert main([*args, "--journal", str(journal)]) == 0
    assert "norm: 0 cases" in capsys.readouterr().out


def test_parts_run_in_processes_of_their_own(tmp_path, capfd):
    args = ["--device", "cpu", "--out", str(tmp_path), "--rounds", "1", "--only", "attention cpu-shapes"]
    assert main(args) == 0
    assert "benchmarks: attention: 2 cases" in capfd.readouterr().out
    records = [json.loads(line) for line in (tmp_path / "cpu.jsonl").read_text().splitlines()]
    assert [r["benchmark"] for r in records] == ["ceilings"] * 3 + ["attention"] * 6


def test_a_provider_that_takes_the_device_along_is_lost_and_said(tmp_path, monkeypatch, capsys):
    import benchmarks.run as run
    from benchmarks.bench_spectral_norm import SMALL, cases

    def broken(device, provider, why):
        raise DeviceLost(provider, why)

    def fail():
        raise RuntimeError("an illegal memory access was encountered")

    def part():
        for case in cases("cpu", SMALL[:2]):
            yield replace(case, providers=[Provider("bad", fail), *case.providers])

    monkeypatch.setattr(harness, "_check_device", broken)
    monkeypatch.setattr(run, "CPU", {"norm": part})
    args = ["--device", "cpu", "--out", str(tmp_path), "--part", "norm", "--journal", str(tmp_path / "journal")]
    assert main([*args, "--rounds", "1"]) == 75
    assert "bad took the device along: an illegal memory access" in capsys.readouterr().out
    assert main([*args, "--rounds", "1"]) == 75  # the other mode
    assert main([*args, "--rounds", "1"]) == 0
    assert "illegal memory access" in (tmp_path / "cpu.jsonl").read_text()


def test_fp32_cases_have_no_tf32_in_products_or_convolutions(monkeypatch, tmp_path, capsys):
    import benchmarks.run as run

    seen = []
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn)
    monkeypatch.setattr(run, "measure", lambda *_: seen.append([b.allow_tf32 for b in backends]) or [])
    monkeypatch.setattr(run, "describe", str)
    cases = [harness.Case("b", "s", dtype, "forward", [], list) for dtype in ("fp32", "tf32")]
    monkeypatch.setattr(run, "CPU", {"x": lambda: cases})
    assert main(["--device", "cpu", "--part", "x", "--rounds", "1", "--dry-run", "--out", str(tmp_path)]) == 0
    assert seen == [[False, False], [True, True]]


def test_a_device_that_is_not_there_is_a_sentence(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["--device", "cuda"]) == 2
    assert "PyTorch finds no CUDA device" in capsys.readouterr().err
