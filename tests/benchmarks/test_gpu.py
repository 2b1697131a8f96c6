import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu, run
from benchmarks.records import ROOT
from sagan_fast.kernels.launch import device_arch


def test_what_is_missing_is_a_sentence_and_status_2(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert capsys.readouterr().err == "benchmarks.gpu: PyTorch finds no CUDA device here\n"
    monkeypatch.setattr(gpu, "find_spec", lambda name: None if name == "triton" else object())
    assert gpu.main([]) == 2
    assert "triton must be installed" in capsys.readouterr().err


def test_a_gpu_that_the_kernels_do_not_run_on_is_a_sentence(monkeypatch, capsys):
    old = SimpleNamespace(name="Tesla V100", major=7, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: old)
    monkeypatch.setattr(gpu, "_keep_log", lambda *_: pytest.fail("it went on"))
    device_arch.cache_clear()
    assert gpu.main([]) == 2
    device_arch.cache_clear()
    assert "the kernels cannot run here: Tesla V100 has compute capability 7.0" in capsys.readouterr().err


def test_a_command_over_its_time_is_stopped_and_said(capsys):
    heeding = "import signal, time; signal.signal(2, signal.default_int_handler); time.sleep(30)"  # under nohup too
    assert not gpu.tests([sys.executable, "-c", heeding], 0.5)
    assert "benchmarks.gpu: stopped after" in capsys.readouterr().err


def test_the_tests_of_the_kernels_come_first_and_none_is_left_out():
    *_, kernels, ops, layers = (name for name in gpu.test_command(True) if name in gpu.FIRST)
    assert [kernels, ops, layers] == gpu.FIRST
    folders = {f"tests/{path.name}" for path in (ROOT / "tests").iterdir() if any(path.rglob("test_*.py"))}
    files = {f"tests/{path.name}" for path in (ROOT / "tests").glob("test_*.py")}
    assert {*folders, *files} <= set(gpu.test_command(False))


@pytest.mark.parametrize("only", ["", "attention-compiled,sweep N256", "tests"])
def test_the_gate_then_the_tests_then_the_rest_in_one_process(only, monkeypatch, tmp_path, capsys):
    did = []

    def supervised(names, given, deadline):
        assert given[:2] == ["--device", "cuda"] and 420 < deadline - time.monotonic() <= 490
        did.append(names)
        return names != ["gate"]

    monkeypatch.setattr(gpu, "missing", lambda: None)
    monkeypatch.setattr(gpu, "_keep_log", lambda path: None)
    monkeypatch.setattr(gpu.gpu_cache, "unpack", lambda: False)
    monkeypatch.setattr(gpu, "_warmer", lambda i, n: did.append("warm") or i)
    monkeypatch.setattr(gpu, "end", lambda process: did.append("end"))
    monkeypatch.setattr(gpu, "tests", lambda command, seconds: did.append("tests") or True)
    monkeypatch.setattr(run, "supervised", supervised)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    status = gpu.main(["--out", str(tmp_path), "--only", only])
    if only == "":
        rest = [part.name for part in run.PARTS if part.timed and part.by_default]
        assert (status, did) == (1, ["warm"] * 4 + [["gate"], "tests"] + ["end"] * 4 + [rest]), "a wrong gate is said"
    else:
        assert (status, did) == (0, ["tests"] if only == "tests" else [["attention-compiled", "sweep"]])
    assert ("Estimates for an H200" in capsys.readouterr().out) == (only != "tests")


def test_a_dry_run_prints_what_fits_and_a_cut_leaves_whole_records(tmp_path):
    """`make gpu` without a GPU, ended by SIGTERM in its second part: nothing runs on."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--out", str(tmp_path)]
    command += ["--only", "gate,float32,attention-compiled official-G"]
    file = tmp_path / "dry-run.jsonl"
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        while process.poll() is None and b'"attention"' not in (file.read_bytes() if file.exists() else b""):
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        printed, _ = process.communicate(timeout=60)
    assert process.returncode == 143
    table = dict(re.findall(r"^(\S+) .* (\d+) +\d+$", printed, re.MULTILINE))
    assert list(table) == ["gate", "float32", "attention-compiled"] and "fit the 510 s given" in printed
    records = [json.loads(line) for line in file.read_text().splitlines()]
    cases = Counter(name for name, *_ in {(r["benchmark"], r["shape"], r["mode"]) for r in records})
    assert cases["gate"] == 2 and cases["attention"] in (1, 2)
    assert not any(str(tmp_path) in line for line in os.popen("ps -eo args").readlines())
