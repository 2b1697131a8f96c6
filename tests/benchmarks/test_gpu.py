import torch

from benchmarks import gpu


def test_what_is_missing_is_a_sentence_and_status_2(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert capsys.readouterr().err == "benchmarks.gpu: PyTorch finds no CUDA device here\n"
    monkeypatch.setattr(gpu, "find_spec", lambda name: None if name == "triton" else object())
    assert gpu.main([]) == 2
    assert "triton must be installed" in capsys.readouterr().err


def test_a_command_over_its_time_is_stopped_and_said(capsys):
    import sys

    assert not gpu._run([sys.executable, "-c", "import time; time.sleep(30)"], 0.5)
    assert "benchmarks.gpu: stopped after" in capsys.readouterr().err
