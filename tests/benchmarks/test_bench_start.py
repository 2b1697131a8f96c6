"""The benchmark of starting: what it runs, and that it runs."""

import pytest

from benchmarks import bench_start
from benchmarks.harness import Target, measure
from benchmarks.tables import start_part


def test_every_case_has_a_base_and_ours():
    found = list(bench_start.cases(Target("cpu", dry_run=True)))
    assert [case.shape for case in found][:4] == ["--help", "--version", "a mistyped command", "import sagan_fast"]
    assert all(len(case.providers) == 2 and case.providers[1].name == "ours" for case in found)
    assert "from_pretrained('" in found[-1].config["programs"]["ours"]


def test_the_table_says_what_comes_beyond_the_base():
    case = {"benchmark": "start", "shape": "--help", "mode": "process", "dtype": "fp32", "method": "wall"}
    stamp = {"device": "CPU", "torch": "2", "triton": "3", "date": "today", "commit": "abc"}
    records = [{**case, **stamp, "provider": name, "p50_us": us} for name, us in (("python", 4e4), ("ours", 7e4))]
    where, table = start_part([*records, {**records[0], "benchmark": "attention", "commit": "def"}])
    assert where.endswith("commit abc.") and "| --help | python | 0.04 | 0.07 | 0.03 |" in table


def test_a_program_is_timed_and_one_that_fails_is_an_error():
    records = measure(bench_start.case("nothing", {"python": "pass", "ours": "pass"}), "cpu", rounds=2, warmup=0)
    assert [record.provider for record in records] == ["python", "ours"]
    assert all(record.p50_us > 1000 and record.samples == 2 for record in records)
    with pytest.raises(RuntimeError, match="NameError"):
        bench_start.microseconds("nope")
