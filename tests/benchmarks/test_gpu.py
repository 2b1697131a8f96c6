from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu
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
    monkeypatch.setattr(gpu, "_run", lambda *_: pytest.fail("it went on"))
    device_arch.cache_clear()
    assert gpu.main([]) == 2
    device_arch.cache_clear()
    assert "the kernels cannot run here: Tesla V100 has compute capability 7.0" in capsys.readouterr().err


def test_a_command_over_its_time_is_stopped_and_said(capsys):
    import sys

    assert not gpu._run([sys.executable, "-c", "import time; time.sleep(30)"], 0.5)
    assert "benchmarks.gpu: stopped after" in capsys.readouterr().err
