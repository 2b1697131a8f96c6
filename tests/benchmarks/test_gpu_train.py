import json
import os
import signal

import pytest
import torch

from benchmarks import gpu_train
from benchmarks.gpu_train import SEEDS, agreement, distance, is_done, main


class Colours(torch.nn.Module):
    """An extractor of three features: the mean of each colour."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().mean((2, 3))


def log(values):
    return [{"step": i, "d_loss": v, "g_loss": -v} for i, v in enumerate(values)]


def test_distances_are_over_common_steps():
    assert distance(log([1.0, 2.0, 9.0]), log([1.5, 2.5])) == pytest.approx(0.5)


def test_agreement_sets_backends_against_seeds():
    logs = {(b, s): log([s + (0.1 if b == "triton" else 0.0)] * 3) for b in ("eager", "triton") for s in (0, 1, 2)}
    found = agreement(logs, ("eager", "triton"))
    assert found["between_backends"] == pytest.approx(0.1)
    assert found["between_seeds"] == pytest.approx((1 + 2 + 1) / 3)


def test_runs_are_resumed_until_all_are_done(tmp_path, capsys):
    args = ["--data", "shapes-32=shapes", "--device", "cpu", "--narrow", "4", "--batch-size", "4", "--steps", "3"]
    args += ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    assert main([*args, "--minutes", "0"]) == 0
    assert "not all runs are done and scored; call this again" in capsys.readouterr().out
    features = tmp_path / "features.pt"
    torch.jit.script(Colours()).save(features)
    assert main([*args, "--minutes", "5", "--features", str(features), "--score-count", "20"]) == 0
    said = capsys.readouterr().out
    assert "the backends agree within the spread of seeds" in said and "(Frechet " in said
    records = [json.loads(line) for line in (tmp_path / "out" / "cpu.jsonl").read_text().splitlines()]
    assert {r["provider"] for r in records} == {"eager", "sdpa"} and all(r["config"]["agree"] for r in records)
    assert all(len(r["config"]["frechet"]) == 3 and min(r["config"]["frechet"]) > 0 for r in records)
    assert all(len(r["config"]["curve"]) == 3 for r in records)
    assert {p.name for p in (tmp_path / "out" / "samples").iterdir()} == {"shapes-32-eager.png", "shapes-32-sdpa.png"}


def test_a_time_that_ends_while_scores_are_computed_is_said(tmp_path, capsys, monkeypatch):
    """The last of the runs trains, as a training run has a handler of its own for the signal; the others are done."""
    *done, last = (f"shapes-32-{backend}-{seed}" for seed in SEEDS for backend in ("eager", "sdpa"))
    for name in done:
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "log.jsonl").write_text('{"step": 1}\n')
    args = ["--data", "shapes-32=shapes", "--device", "cpu", "--narrow", "4", "--batch-size", "4", "--steps", "1"]
    monkeypatch.setattr(gpu_train, "summarise", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    assert main([*args, "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out"), "--minutes", "5"]) == 0
    assert "not all runs are done and scored; call this again" in capsys.readouterr().out
    assert is_done(tmp_path / "runs" / last, 1) and len(list((tmp_path / "runs").iterdir())) == len(done) + 1


def test_bad_input_is_a_sentence(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["--data", "cifar-32=shapes"]) == 2
    assert "no CUDA device" in capsys.readouterr().err
    assert main(["--device", "cpu"]) == 2
    assert "--data PRESET=SPEC must be given" in capsys.readouterr().err
