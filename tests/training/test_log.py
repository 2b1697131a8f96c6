import errno
import io
import json
import os
import re

import pytest
import torch

from sagan_fast.errors import InputError
from sagan_fast.training import log as log_module
from sagan_fast.training.log import RunLog, SilentLog

VALUES = {"d_loss": 1.0, "g_loss": -0.5, "d_real": 0.25, "d_fake": -0.25, "images_per_s": 12.0, "gamma/g.x": 0.125}


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lines_go_to_jsonl_the_terminal_and_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    stream = io.StringIO()
    with RunLog(tmp_path, 0, 100, stream) as log:
        log.line(10, VALUES)
        log.line(20, {**VALUES, "d_loss": 0.5})
        log.say("a sentence")
    assert [entry["step"] for entry in lines(tmp_path / "log.jsonl")] == [10, 20]
    assert lines(tmp_path / "log.jsonl")[1]["d_loss"] == 0.5
    assert "step 20/100  D loss 0.500" in stream.getvalue() and "a sentence\n" in stream.getvalue()
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(e.step, e.value) for e in board.Scalars("gamma/g.x")] == [(10, 0.125), (20, 0.125)]


def test_a_resumed_run_drops_what_it_will_write_again(tmp_path):
    with RunLog(tmp_path, 0, 100, io.StringIO()) as log:
        for step in (10, 20, 30):
            log.line(step, VALUES)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 40, "d_lo')  # cut off by a crash
    with RunLog(tmp_path, 20, 100, io.StringIO()) as log:
        log.line(30, {**VALUES, "d_loss": 9.0})
    assert [(e["step"], e["d_loss"]) for e in lines(tmp_path / "log.jsonl")] == [(10, 1.0), (20, 1.0), (30, 9.0)]


def test_a_terminal_gets_a_progress_bar(tmp_path):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    with RunLog(tmp_path, 0, 100, stream) as log:
        log.step_done(5)
        log.line(10, VALUES)
        log.say("a [sentence]")
    assert "10/100" in stream.getvalue() and "a [sentence]" in stream.getvalue()


def test_the_bar_shows_the_first_step_and_stays(tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for columns, words in (
        ("140", "D loss 1.000  G loss -0.500  D real +0.25"),
        ("80", "D 1.00 G -0.50 real +0.2 fake -0.2"),
    ):
        monkeypatch.setenv("COLUMNS", columns)
        stream = Terminal()
        numbers = {name: torch.tensor(value) for name, value in VALUES.items()}
        with RunLog(tmp_path, 0, 1_000_000, stream, batch_size=8) as log:
            for step in (1, 2, 999_999):
                log.step_done(step, numbers)
            log.line(1_000_000, VALUES)
        last = next(line for line in reversed(stream.getvalue().splitlines()) if "1000000/1000000" in line)
        shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", last.split("\r")[-1])
        assert words in shown and len(shown.rstrip()) <= int(columns), shown


def test_without_a_terminal_the_first_step_is_a_line(tmp_path):
    stream = io.StringIO()
    with RunLog(tmp_path, 7, 100, stream) as log:
        for step in (8, 9):
            log.step_done(step, {name: torch.tensor(value) for name, value in VALUES.items()})
    assert stream.getvalue() == "step 8/100  D loss 1.000  G loss -0.500  D real +0.25  D fake -0.25\n"


def test_tensorboard_has_groups_pictures_and_the_configuration(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with RunLog(tmp_path, 0, 100, io.StringIO()) as log:
        log.line(10, VALUES)
        log.picture("samples", torch.zeros(3, 8, 8, dtype=torch.uint8), 10)
        log.words("config", "steps: 3\nseed: 1")
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    tags = board.Tags()
    assert {"loss/discriminator", "loss/generator", "score/real", "score/fake", "speed/images_per_s"} <= set(
        tags["scalars"]
    )
    assert tags["images"] == ["samples"] and board.Images("samples")[0].step == 10
    text = board.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert text == "    steps: 3\n    seed: 1"


def test_curves_are_for_tensorboard_alone(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with RunLog(tmp_path, 0, 100, io.StringIO()) as log:
        log.line(10, VALUES, {"sigma/g.linear": 2.0})
    assert "sigma/g.linear" not in lines(tmp_path / "log.jsonl")[0]
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [e.value for e in board.Scalars("sigma/g.linear")] == [2.0]


def test_a_line_says_how_long_the_rest_takes(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(log_module.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    with RunLog(tmp_path, 10, 110, stream) as log:
        now[0] += 3600
        log.line(20, VALUES)
    assert stream.getvalue().endswith("12 images/s  9:00:00 left\n")


def test_a_long_silence_is_broken_by_a_heartbeat(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(log_module.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    with RunLog(tmp_path, 0, 100, stream) as log:
        for step in range(1, 11):
            now[0] += 25
            log.step_done(step)
    assert stream.getvalue().splitlines() == [
        "step 3/100  25.00 s a step  0:40:25 left",
        "step 6/100  25.00 s a step  0:39:10 left",
        "step 9/100  25.00 s a step  0:37:55 left",
    ]


def test_lines_of_a_run_that_went_back_are_kept_elsewhere(tmp_path):
    with RunLog(tmp_path, 0, 100, io.StringIO()) as log:
        for step in (10, 20, 30):
            log.line(step, VALUES)
        log.back_to(10)
        log.line(20, {**VALUES, "d_loss": 2.0})
    assert [(e["step"], e["d_loss"]) for e in lines(tmp_path / "log.jsonl")] == [(10, 1.0), (20, 2.0)]
    assert [e["step"] for e in lines(tmp_path / "diverged.jsonl")] == [20, 30]


def test_a_full_disk_is_a_sentence(tmp_path, monkeypatch):
    class Full(io.StringIO):
        def flush(self):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    said = pytest.raises(InputError, match="cannot write the log in .*: No space left on device")
    with said, RunLog(tmp_path, 0, 100, io.StringIO()) as log:
        log.file = Full()
        log.line(1, VALUES)
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot write .*: Not a directory"):
        RunLog(tmp_path / "file", 0, 100, io.StringIO())


def test_a_process_that_is_not_the_main_one_says_nothing(tmp_path, capsys):
    with SilentLog() as log:
        log.line(1, VALUES)
        log.step_done(1)
        log.back_to(0)
        log.say("a sentence")
    assert capsys.readouterr() == ("", "")
