"""The limits are the largest of three times at rates that were measured."""

import pytest

from benchmarks import ceilings
from benchmarks.harness import Case


@pytest.fixture
def quick(monkeypatch):
    """Small sizes, and no rate kept beyond the test."""
    monkeypatch.setitem(ceilings.COPY_BYTES, "cpu", 2**20)
    monkeypatch.setitem(ceilings.PRODUCT, "cpu", 64)
    rates = (ceilings.copy_bytes_per_s, ceilings.product_flops, ceilings.exps_per_s)
    for rate in rates:
        rate.cache_clear()
    yield
    for rate in rates:
        rate.cache_clear()


def test_of_the_cpu_are_measured_and_recorded(quick):
    made = ceilings.records("cpu")
    assert [record.shape for record in made] == ["copy 1 MiB", "2**20 exponentials", "product 64"]
    assert all(record.p50_us > 0 and record.note.split()[0] not in ("0", "0.0") for record in made)


@pytest.mark.parametrize(("needs", "name"), [((1e12, 1, 1), "flop"), ((1, 1e12, 1), "exp"), ((1, 1, 1e13), "bytes")])
def test_the_slowest_sets_the_limit(needs, name, quick):
    case = Case("attention", "x", "fp32", "forward", [], list, needs=needs)
    time, what = ceilings.bound(case, "cpu")
    assert what == name and time > 1e3
