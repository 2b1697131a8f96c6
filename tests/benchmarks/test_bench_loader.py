"""The loader's benchmark makes its data, measures what it says, and reads its records back."""

import builtins
import json

import numpy as np
import pytest

from benchmarks import bench_loader
from benchmarks.harness import Effort
from benchmarks.run import main


def test_records(tmp_path, capsys):
    assert main(["--device", "cpu", "--only", "loader", "--dry-run", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "benchmarks: 2 cases; nothing recorded" in out and "images/s" in out and not list(tmp_path.iterdir())


def test_providers_and_workers():
    (alone, two) = bench_loader.records("cpu", Effort(rounds=2), bench_loader.TINY)
    assert [(r.provider, r.mode) for r in alone] == [("packed", "workers-0"), ("folder-jpeg", "workers-0")]
    assert [r.provider for r in two] == ["packed", "packed-processes", "folder-jpeg"]
    for record in alone + two:
        assert record.p20_us <= record.p50_us <= record.p80_us and record.samples == 2 and not record.error
        assert record.note == f"{256 / record.p50_us * 1e6:.0f} images/s"


def test_a_sample_counts_no_batch_that_was_read_ahead(monkeypatch):
    """With a clock that only reading moves, a batch takes what its images take, however many workers there are."""

    class Stream:
        taken = 0

        def __next__(self):
            self.taken += 1
            return ()

        def close(self):
            closed.append(self.taken)

    now, closed = [0.0], []
    monkeypatch.setattr(bench_loader, "batches", lambda *args, **options: Stream())
    monkeypatch.setattr(bench_loader.time, "perf_counter", lambda: now.append(now[-1] + 1) or now[-1])
    assert bench_loader.seconds_of_a_batch(None, 8, 4, "cpu", 2, 0) == 1 / 16
    assert closed == [17 + 16]


def test_made_up_data(tmp_path):
    from sagan_fast.data import open_dataset
    from sagan_fast.data.packed_check import check

    bench_loader.write_packed(tmp_path / "packed", bench_loader.TINY, np.random.default_rng())
    assert check(tmp_path / "packed").num_images == 64
    bench_loader.write_jpegs(tmp_path / "jpegs", 4, np.random.default_rng())
    assert len(open_dataset(f"folder:{tmp_path / 'jpegs'}", resolution=8)) == 4
    for path in (tmp_path / "jpegs").rglob("*.jpg"):
        assert 60_000 < path.stat().st_size < 160_000


def test_without_pillow_the_packed_set_is_measured_all_the_same(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **options):
        if name.split(".")[0] == "PIL":
            raise ImportError("No module named 'PIL'")
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    first, _ = bench_loader.records("cpu", Effort(rounds=1), bench_loader.TINY)
    assert [(r.provider, bool(r.error)) for r in first] == [("folder-jpeg", True), ("packed", False)]
    assert first[0].error == "cannot run: No module named 'PIL'"


def test_summary(tmp_path):
    assert bench_loader.summary([], []).splitlines() == [
        "loader: not measured",
        "training steps on a GPU ask for: not measured",
    ]
    loader = {
        "benchmark": "loader", "provider": "packed", "p50_us": 12800.0, "device": "cpu", "date": "today",
        "config": {"workers": 8, "processors": 2},
    }  # fmt: skip
    step = {
        "benchmark": "train_step", "provider": "ours", "p50_us": 1e5, "shape": "official", "device": "H200",
        "config": {"batch_size": 256},
    }  # fmt: skip
    text = bench_loader.summary(json.loads(json.dumps([loader])), [step, {**step, "provider": "eager"}])
    assert text.splitlines()[-1] == "training steps on a GPU ask for: 2560 images/s (official, H200)"
    assert text.splitlines()[-2].split() == ["packed", "8", "20000", "10000", "cpu", "today"]


@pytest.mark.gpu
def test_to_the_device():
    for found in bench_loader.records("cuda", Effort(rounds=1), bench_loader.TINY):
        assert all(r.config["to_device"] and not r.error for r in found)
