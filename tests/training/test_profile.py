import json

import pytest
import torch

from sagan_fast.errors import InputError
from sagan_fast.training.profile import WARM_UP, Profile


def test_a_trace_of_the_steps_asked_for_is_written_once(tmp_path):
    profile = Profile(tmp_path, 2)
    written = []
    for step in range(1, WARM_UP + 5):
        with torch.profiler.record_function(f"step {step}"):
            torch.ones(3).sum()
        written.append(profile.step_done(step))
    path = tmp_path / "profile" / f"step-{WARM_UP + 1:07d}.json"
    assert [p for p in written if p] == [path] and profile.close() is None
    names = {event.get("name") for event in json.loads(path.read_text())["traceEvents"]}
    assert {f"step {s}" for s in range(1, WARM_UP + 5)} & names == {f"step {WARM_UP + 1}", f"step {WARM_UP + 2}"}


def test_a_run_that_ends_early_leaves_what_there_is(tmp_path):
    profile = Profile(tmp_path, 50)
    for step in range(1, WARM_UP + 2):
        assert profile.step_done(step) is None
    assert profile.close().exists()


def test_nothing_is_traced_unasked_and_a_bad_folder_is_a_sentence(tmp_path):
    off = Profile(tmp_path, 0)
    assert [off.step_done(step) for step in range(9)] == [None] * 9 and off.close() is None
    (tmp_path / "profile").write_text("x")
    profile = Profile(tmp_path, 1)
    for step in range(WARM_UP):
        profile.step_done(step)
    with pytest.raises(InputError, match="cannot write"):
        profile.close()
