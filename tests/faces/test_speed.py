"""What is timed against each other computes the same."""

import torch

from sagan_fast.faces.fused import FusedFaceBoxes
from sagan_fast.faces.speed import forwards, measured


def test_all_ways_agree(trained, generator):
    x = torch.rand(1, 3, 64, 96, generator=generator) * 255 - 117
    with torch.no_grad():
        results = {name: run(x) for name, (run, _) in forwards(trained).items()}
    loc, conf = results.pop("as published")
    for name, found in results.items():
        if torch.is_tensor(found):
            found = found[..., :4], torch.stack([-found[..., 4], found[..., 4]], -1).float().div(2).softmax(-1)
        near = 0.1 if "bf16" in name else 1e-4
        assert float((found[1] - conf).abs().max()) <= near, name
        assert float((found[0] - loc).norm() / loc.norm()) <= near, name


def test_times_of_all_and_the_threads_set_back(random_weights, monkeypatch):
    monkeypatch.setattr("sagan_fast.faces.speed._onnx_runtime", lambda net: None)
    before = torch.get_num_threads()
    times = measured(random_weights, 64, 64, 1, 2)
    assert list(times) == ["as published", "as published, channels_last", "fused", "fused, bf16"]
    assert all(seconds > 0 for seconds in times.values()) and torch.get_num_threads() == before


def test_the_rewrite_does_less_work(trained):
    """Multiply-adds of all convolutions and the values that go through pools and concatenations, counted by shape."""
    from torch.utils.flop_counter import FlopCounterMode

    x = torch.zeros(1, 3, 96, 128)
    counts = []
    for run in (trained, FusedFaceBoxes(trained).codes):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            run(x)
        counts.append(counter.get_total_flops())
    assert counts[1] < counts[0]
