import io
import json

from sagan_fast.training.log import RunLog

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
