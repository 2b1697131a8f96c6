import sys
import time

from benchmarks.journal import Journal, supervise

CHILD = """
import os, sys, time
from pathlib import Path
from benchmarks.journal import Journal
journal = Journal(Path(sys.argv[-1]))
for case in ("a", "b", "c", "d"):
    if case in journal.done:
        continue
    for provider in ("good", "bad"):
        if provider not in journal.lost.get(case, {}):
            journal.begin(case, provider)
            if (case, provider) == ("b", "bad"):
                os.abort()
            if (case, provider) == ("c", "bad"):
                time.sleep(60)
    if case == "d":
        journal.begin(case, "timing")
        os.abort()
    journal.finish(case)
"""


def test_a_journal_is_read_back(tmp_path):
    first = Journal(tmp_path / "j")
    first.begin("x", "p")
    first.lose("x", "p", "why")
    first.finish("y")
    first.begin("z", "q")
    second = Journal(tmp_path / "j")
    assert second.done == {"y"} and second.lost == {"x": {"p": "why"}} and second.last == ("z", "q")


def test_what_crashes_or_hangs_is_left_out_and_the_rest_done(tmp_path, capfd):
    path = tmp_path / "journal"
    assert supervise([sys.executable, "-c", CHILD], path, time.monotonic() + 60, stall=2)
    journal = Journal(path)
    assert journal.done == {"a", "b", "c", "d"}
    assert "status -6" in journal.lost["b"]["bad"] and "no sign of life for 2 s" in journal.lost["c"]["bad"]
    assert "d: timing: the process ended" in capfd.readouterr().out


def test_nothing_runs_after_the_deadline(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("benchmarks.journal.GRACE", 0.5)
    began = time.monotonic()
    assert supervise([sys.executable, "-c", "import time; time.sleep(60)"], tmp_path / "j", began + 1, stall=30)
    assert time.monotonic() - began < 10 and "time is up" in capfd.readouterr().out


def test_a_process_that_always_fails_is_given_up(tmp_path):
    assert not supervise([sys.executable, "-c", "raise SystemExit(3)"], tmp_path / "j", time.monotonic() + 60, stall=9)
