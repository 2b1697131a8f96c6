"""What is read of a run while it writes."""

import json
import os

import pytest

from sagan_fast.errors import InputError
from sagan_fast.view.history import History, is_started, mark_of, run_of, step_of


def line(step, **values):
    return json.dumps({"step": step, "d_loss": 1.0, **values}) + "\n"


def test_the_log_is_read_on_and_read_anew_after_a_rollback(tmp_path):
    history, log = History(tmp_path), tmp_path / "log.jsonl"
    assert history.lines() == []
    log.write_text(line(1) + "broken\n[]\n" + line(2)[:9])
    assert [found["step"] for found in history.lines()] == [1]
    with log.open("a") as file:
        file.write(line(2)[9:] + line(3))
    assert [found["step"] for found in history.lines()] == [1, 2, 3]
    assert [found["step"] for found in history.lines()] == [1, 2, 3]
    other = tmp_path / "new"
    other.write_text(line(1) + line(5) + line(6) + line(7) + line(8))
    os.replace(other, log)
    assert [found["step"] for found in history.lines()] == [1, 5, 6, 7, 8]
    log.write_text(line(4))
    assert [found["step"] for found in history.lines()] == [4]


def test_pictures_are_those_of_the_trainer_by_step(tmp_path):
    (tmp_path / "samples").mkdir()
    for name in ("0000010.png", "0000009.png", "1000000.png", "attention.png", "7.jpg"):
        (tmp_path / "samples" / name).write_bytes(b"")
    history = History(tmp_path)
    assert [picture.step for picture in history.pictures()] == [9, 10, 1000000]
    assert history.picture("0000010.png").name == "0000010.png"
    for name in ("attention.png", "../samples/0000010.png", "data.png", ""):
        assert history.picture(name) is None


def test_links_out_of_the_run_are_absent(tmp_path):
    run, outside = tmp_path / "run", tmp_path / "outside"
    for folder in (run / "samples", run / "evaluation", outside):
        folder.mkdir(parents=True)
    result = {"fid": 1.0, "protocol": {}}
    for name, text in (("log.jsonl", line(1)), ("config.yaml", "steps: 3\n"), ("step-1.json", json.dumps(result)),
                       ("0000001.png", "x")):  # fmt: skip
        (outside / name).write_text(text)
        place = {"step-1.json": "evaluation", "0000001.png": "samples"}.get(name, ".")
        (run / place / name).symlink_to(outside / name)
    history = History(run)
    assert (history.lines(), history.config(), history.scores(), history.pictures()) == ([], {}, [], [])


def test_scores_are_those_with_a_protocol_by_step(tmp_path):
    (tmp_path / "evaluation").mkdir()
    for step in (20, 3):
        result = {"fid": 1.0, "protocol": {"generated": {"step": step}}}
        (tmp_path / "evaluation" / f"step-{step}.json").write_text(json.dumps(result))
    (tmp_path / "evaluation" / "cut.json").write_text('{"fid": ')
    (tmp_path / "data.json").write_text('{"images": 3}')
    (tmp_path / "scores.json").write_text('{"fid": 2.0, "protocol": {}}')
    assert [step_of(result) for result in History(tmp_path).scores()] == [None, 3, 20]


def test_a_damaged_configuration_is_none(tmp_path):
    for text in ("steps: [", "- 1", "\x00"):
        (tmp_path / "config.yaml").write_text(text)
        assert History(tmp_path).config() == {}


def test_sources_and_their_runs(tiny_run, export, tmp_path):
    last = tiny_run / "checkpoints" / "last.pt"
    assert run_of(tiny_run) == tiny_run and run_of(last) == tiny_run and run_of(export) is None
    assert run_of(tmp_path / "some.pt") is None
    assert is_started(tiny_run) and not is_started(last) and not is_started(tmp_path)
    assert mark_of(tiny_run) == mark_of(last) and mark_of(export) is not None
    with pytest.raises(InputError):
        mark_of(tmp_path)
