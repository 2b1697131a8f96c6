import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import harness
from benchmarks.harness import DeviceLost, Provider
from benchmarks.journal import Journal
from benchmarks.run import CUDA, main


def test_the_dry_run_walks_every_case_and_records_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("benchmarks.run.plan", lambda: "what a GPU would be given")
    assert main(["--dry-run", "--out", str(tmp_path), "--minutes", "30"]) == 0
    out = capsys.readouterr().out
    assert "benchmarks: dry: 37 cases; nothing recorded" in out and not list(tmp_path.iterdir())
    assert "wrong" not in out and "cannot run" not in out
    assert out.startswith("what a GPU would be given\n")


def test_the_plan_for_a_gpu_is_made_without_one():
    """In a process without the tests' own torch.empty, on which the meta device does not work."""
    command = [sys.executable, "-c", "from benchmarks.run import plan; print(plan())"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    parts = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert list(parts) == list(CUDA) and parts["gate"] == "18 cases of eager, triton"
    assert all(name in parts["attention-compiled"] for name in ("sdpa-cudnn", "flex", "xformers", "flash-attention-4"))
    assert "parametrization-compiled" in parts["spectral_norm"]


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
    args = ["--device", "cpu", "--out", str(tmp_path), "--rounds", "1", "--only", "layers spectral-conv"]
    assert main(args) == 0
    assert "benchmarks: layers: 2 cases" in capfd.readouterr().out
    records = [json.loads(line) for line in (tmp_path / "cpu.jsonl").read_text().splitlines()]
    assert [r["benchmark"] for r in records] == ["ceilings"] * 3 + ["layers"] * 4


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


def test_a_device_that_is_not_there_is_a_sentence(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["--device", "cuda"]) == 2
    assert "PyTorch finds no CUDA device" in capsys.readouterr().err
