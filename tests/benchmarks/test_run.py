import json

import torch

from benchmarks.run import main


def test_the_dry_run_walks_every_case_and_records_nothing(tmp_path, capsys):
    assert main(["--dry-run", "--out", str(tmp_path), "--minutes", "30"]) == 0
    out = capsys.readouterr().out
    assert "benchmarks: 21 cases; nothing recorded" in out and not list(tmp_path.iterdir())
    assert "wrong" not in out and "cannot run" not in out


def test_records_are_written_and_only_selects(tmp_path, capsys, monkeypatch):
    import benchmarks.run as run
    from benchmarks.bench_spectral_norm import SMALL, cases

    monkeypatch.setattr(run, "plan", lambda device, dry: cases("cpu", SMALL[:5]))
    assert main(["--device", "cpu", "--out", str(tmp_path), "--rounds", "1", "--only", "spectral_norm"]) == 0
    records = [json.loads(line) for line in (tmp_path / "cpu.jsonl").read_text().splitlines()]
    assert {r["provider"] for r in records} == {"parametrization", "legacy", "biggan", "function", "group"}
    assert all(r["error"] == "" and r["p50_us"] > 0 for r in records)
    assert main(["--device", "cpu", "--out", str(tmp_path), "--only", "none such"]) == 0
    assert "0 cases" in capsys.readouterr().out


def test_a_device_that_is_not_there_is_a_sentence(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["--device", "cuda"]) == 2
    assert "PyTorch finds no CUDA device" in capsys.readouterr().err
