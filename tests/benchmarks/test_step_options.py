import argparse

import pytest

from benchmarks.step_options import KEPT, OPTIONS, PEER, calls_of, describe, main, measure, options_table, step_of

SMALL = argparse.Namespace(channels=8, classes=3, rounds=2, threads=1)


class Here:
    """A worker in this process, with a step that takes a second each time."""

    def __init__(self, name, batch, options):
        self.run = step_of(name, options, batch)

    def step(self):
        return {"losses": self.run(), "seconds": 1.0, "peak": 2**30}

    def end(self):
        self.run = None


@pytest.mark.slow
def test_every_variant_has_the_same_losses(monkeypatch):
    monkeypatch.setattr("benchmarks.step_options.calls_of", lambda name, options: len(name))
    records = measure(SMALL, 2, Here)
    assert [r.provider for r in records] == [PEER, *OPTIONS]
    assert all(r.p50_us == 1e6 and r.relative_rms < 1e-2 and r.samples == 2 for r in records)
    assert records[1].relative_rms == 0 and records[1].config["of_not_folded"] == 1
    lines = describe(records).splitlines()
    assert lines[0] == "feat64-128-ch8-batch2" and PEER in lines[3] and "not folded" in lines[4]


def test_a_variant_with_other_losses_is_refused():
    class Wrong(Here):
        def __init__(self, name, batch, options):
            self.run = lambda: [1.0, 2.1 if name == "folded" else 2.0]

    with pytest.raises(RuntimeError, match=r"folded: losses \[1.0, 2.1\] are not \[1.0, 2.0\]"):
        measure(SMALL, 2, Wrong)


@pytest.mark.slow
def test_operator_calls_of_the_other_variants():
    """3,117 were counted in BigGAN-PyTorch's SAGAN."""
    assert 2900 < calls_of(PEER, SMALL) < 3400
    assert calls_of("folded", SMALL) <= calls_of("not folded", SMALL) < 1000


def test_operator_calls_of_a_step():
    assert calls_of(KEPT, SMALL) < 900


@pytest.mark.slow
def test_every_variant_has_a_process_of_its_own(capsys):
    main(["--channels", "8", "--classes", "3", "--rounds", "1", "--batch", "2"])
    assert capsys.readouterr().out.startswith("feat64-128-ch8-batch2")


def test_a_row_of_the_table():
    record = dict(provider="not folded", p50_us=2e6, peak_bytes=2**31, relative_rms=0.0)
    record["config"] = dict(of_not_folded=1.0, peer_over_this=2.0, calls=7)
    gone = {**record, "provider": "an option of the past"}
    assert options_table([gone, record]).splitlines()[2:] == [
        "| not folded | 2.00 | 1.00 | 2.00 | 2.00 | 1.00 | 7 | 0e+00 |"
    ]
