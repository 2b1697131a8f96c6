"""The loader's benchmark makes its data, holds what is loaded against it, and measures what it says."""

import builtins
from dataclasses import replace

import pytest

from benchmarks import bench_loader
from benchmarks.harness import Target, measure
from benchmarks.run import main


def test_a_dry_run_records_beside_the_results(tmp_path, capsys):
    assert main(["--dry-run", "--out", str(tmp_path), "--part", "loader"]) == 0
    out = capsys.readouterr().out
    assert "benchmarks: loader: 2 cases\n" in out and "images/s" in out
    assert "wrong" not in out and [path.name for path in tmp_path.iterdir()] == ["dry-run.jsonl"]


def measured(device="cpu", rounds=1):
    cases = bench_loader.cases(Target(device), bench_loader.TINY)
    return [measure(case, device, rounds) for case in cases]


def test_providers_and_workers():
    alone, two = measured(rounds=2)
    assert [(r.provider, r.mode) for r in alone] == [("packed", "workers-0"), ("folder-jpeg", "workers-0")]
    assert [r.provider for r in two] == ["packed", "packed-processes", "folder-jpeg"]
    for record in alone + two:
        assert record.p20_us <= record.p50_us <= record.p80_us and record.samples == 2 and not record.error
        assert record.method == "wall" and record.config["images"] == 256


def test_a_loader_with_other_images_is_wrong(monkeypatch):
    real = bench_loader.first_batch
    monkeypatch.setattr(bench_loader, "first_batch", lambda *a: [images.flip(0) for images in real(*a)])
    assert all(r.error.startswith("wrong") and r.p50_us is None for found in measured() for r in found)


def test_a_slow_sample_is_not_taken_often():
    for case in bench_loader.cases(Target("cpu"), bench_loader.TINY):
        assert case.most_rounds == 5


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


def test_made_up_data(tmp_path, rng):
    from sagan_fast.data import open_dataset
    from sagan_fast.data.packed_check import check

    bench_loader.write_packed(tmp_path / "packed", bench_loader.TINY, rng)
    assert check(tmp_path / "packed").num_images == 64
    bench_loader.write_jpegs(tmp_path / "jpegs", replace(bench_loader.TINY, files=4), rng)
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
    first, _ = measured()
    assert [(r.provider, bool(r.error)) for r in first] == [("folder-jpeg", True), ("packed", False)]
    assert first[0].error == "cannot run: ImportError: No module named 'PIL'"


@pytest.mark.gpu
def test_to_the_device():
    for found in measured("cuda"):
        assert all(r.config["to_device"] and not r.error for r in found)
