"""The command line as a user meets it: help, exit statuses, sentences."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sagan_fast import cli


def test_help_is_there_for_all_and_for_each(capsys):
    assert cli.main(["--help"]) == 0
    assert "generate images from a run or checkpoint" in capsys.readouterr().out
    for command in ("train", "sample", "info"):
        with pytest.raises(SystemExit) as stop:
            cli.main([command, "--help"])
        assert stop.value.code == 0
    out = capsys.readouterr().out
    for word in ("--batch-size", "--generator.base-channels", "--truncation", "--class-id", "images a step"):
        assert word in out


NARROW = ["--generator.base-channels=2", "--discriminator.base-channels=2"]
SHAPES = ["train", "--preset", "shapes-32", "--out", "x"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["tran"], "unknown command 'tran': did you mean 'train'?"),
        (["train", "--out", "x"], "--preset NAME or --config FILE must be given; presets are"),
        (["train", "--preset", "shapes-31", "--out", "x"], "unknown preset 'shapes-31'"),
        ([*SHAPES, "--bach-size=3"], "--bach-size: did you mean '--batch-size'?"),
        ([*SHAPES, "--generator.z-dm=3"], "did you mean '--generator.z-dim'?"),
        ([*SHAPES, "--batch-size", "many"], "--batch-size must be a whole number"),
        (["train", "--resume", "--out", "x"], "there is no run in x to resume; to start one, add --preset NAME"),
        ([*SHAPES, "--resume", "--init-from", "y"], "give one of them"),
        (["train", "--init-from", "none", "--out", "x"], "there is no run folder or checkpoint none"),
        ([*SHAPES, "--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["train", "--preset", "shapes-32"], "--out must be given: the folder of the run"),
        (["train", "--preset", "cifar-32", "--out", "x"], "--data must be given: the images, such as folder:PATH"),
        (["train", "--preset"], "--preset must be followed by a value"),
        (["train", "--preste", "cifar-32"], "unknown option --preste: did you mean '--preset'?"),
        (["train", "--resume"], "--out RUN must be given"),
        ([*SHAPES, "--base-channels=4"], "'--generator.base-channels' or '--discriminator.base-channels'?"),
        ([*SHAPES, "--generator.attention-resolutions=[7]"], "--generator.attention-resolutions must be map sizes"),
        ([*SHAPES, "--batch-size=8.0"], "--batch-size must be a whole number: write 8"),
        (["trane-it-now"], "unknown command 'trane-it-now'; `sagan-fast --help` lists the commands"),
        ([*SHAPES, "--data", "folder:/none/at/all"], "/none/at/all"),
        (["train", "--preset", "shapes-32", "--config", "c", "--out", "x"], "both whole recipes: give one"),
        (["train", "--config", "/none.yaml", "--out", "x"], "cannot read /none.yaml"),
        (["sample", "/none", "--out", "x"], "there is no run folder or checkpoint /none"),
        (["sample", "/none"], "--out must be given"),
        (["sample", "nowhere", "--out", "x.png"], "there is no run folder or checkpoint nowhere"),
        (["attention", "nowhere", "--out", "x.jpg"], "there is no run folder or checkpoint nowhere"),
        (["evaluate", "nowhere", "--data", "shapes", "--json", "new/x.json"], "there is no run folder or checkpoint"),
        (["export", "/none", "--out", "model.onnx"], "there is no run folder or checkpoint /none"),
        (["info", "/none/run"], "there is no run folder or checkpoint /none/run"),
        (["info", "--verbos"], "unknown option --verbos"),
    ],
)  # fmt: skip
def test_bad_input_is_a_sentence_and_status_2(args, message, tmp_path, monkeypatch, sentence):
    monkeypatch.chdir(tmp_path)
    assert cli.main(args) == 2
    assert message in sentence()
    assert list(tmp_path.iterdir()) == []


def test_a_backend_that_cannot_run_is_refused_before_anything_is_written(tmp_path, monkeypatch, sentence):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.chdir(tmp_path)
    assert cli.main([*SHAPES, *NARROW, "--backend", "triton", "--device", "cpu"]) == 2
    said = sentence()
    assert "--backend triton cannot run here: " in said and "; --backend auto takes one that can" in said
    assert list(tmp_path.iterdir()) == []


def test_the_wish_for_an_end_is_granted_without_a_traceback(tmp_path, monkeypatch, sentence):
    def interrupted(args):
        signal.raise_signal(signal.SIGINT)

    import sagan_fast.commands.info as info

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(info, "run", interrupted)
    assert cli.main(["info"]) == 130 and sentence() == "sagan-fast: interrupted\n"
    assert signal.getsignal(signal.SIGINT) is before


def test_in_the_midst_of_an_import_the_process_ends_at_once(tmp_path, monkeypatch, capfd):
    (tmp_path / "module_of_this_test.py").write_text("import signal\nsignal.raise_signal(signal.SIGINT)\n")
    monkeypatch.syspath_prepend(tmp_path)

    def leave(status):
        raise SystemExit(status)

    import sagan_fast.commands.info as info

    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(info, "run", lambda args: __import__("module_of_this_test"))
    with pytest.raises(SystemExit) as stop:
        cli.main(["info"])
    assert stop.value.code == 130 and capfd.readouterr().err == "sagan-fast: interrupted\n"


def test_ctrl_c_while_pytorch_is_imported():
    program = """
import sys
from sagan_fast import cli
class Announce:
    def find_spec(self, name, path=None, target=None):
        if name == "torch._C":
            print("importing", flush=True)
sys.meta_path.insert(0, Announce())
sys.exit(cli.main(["info"]))
"""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", program], **pipes) as started:
        assert started.stdout.readline() == "importing\n"
        started.send_signal(signal.SIGINT)
        assert started.communicate(timeout=60) == ("", "sagan-fast: interrupted\n") and started.returncode == 130


def test_without_pytorch_names_are_listed_and_unknown_ones_refused():
    import sagan_fast

    assert set(sagan_fast.__all__) <= set(dir(sagan_fast))
    with pytest.raises(AttributeError, match="has no attribute 'Generater'"):
        sagan_fast.Generater  # noqa: B018
    hints = (Path(sagan_fast.__file__)).read_text()
    for name, home in sagan_fast._HOMES.items():
        found = re.search(rf"from sagan_fast\.{re.escape(home)} import [\w, ]*\b{name}\b", hints)
        assert found, f"{name} is not imported for type checkers"
        assert getattr(sagan_fast, name).__name__ == name


def test_the_installed_command_runs():
    command = os.path.join(os.path.dirname(sys.executable), "sagan-fast")
    done = subprocess.run([command, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("sagan-fast ")
