"""The benchmark of starting: what it runs, and that it runs."""

import pytest

from benchmarks import bench_start
from benchmarks.harness import Target, measure


def test_every_case_has_a_base_and_ours():
    found = list(bench_start.cases(Target("cpu", dry_run=True)))
    assert [case.shape for case in found][:4] == ["--help", "--version", "a mistyped command", "import sagan_fast"]
    assert all(len(case.providers) == 2 and case.providers[1].name == "ours" for case in found)
    assert "from_pretrained('" in found[-1].config["programs"]["ours"]


def test_a_program_is_timed_and_one_that_fails_is_an_error():
    records = measure(bench_start.case("nothing", {"python": "pass", "ours": "pass"}), "cpu", rounds=2, warmup=0)
    assert [record.provider for record in records] == ["python", "ours"]
    assert all(record.p50_us > 1000 and record.samples == 2 for record in records)
    with pytest.raises(RuntimeError, match="NameError"):
        bench_start.microseconds("nope")
