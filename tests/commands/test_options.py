"""Options from dataclasses, and errors in a sentence that names the nearest key or what a value must be."""

import subprocess
import sys
from dataclasses import dataclass

import pytest

from sagan_fast import cli
from sagan_fast.choices import Device
from sagan_fast.commands.options import as_options, as_typed, read_options, underscored
from sagan_fast.errors import InputError


def test_an_unknown_key_in_a_file_names_the_nearest(tmp_path, sentence):
    (tmp_path / "c.yaml").write_text("data: shapes\nout: x\ngenerator: {base_chanels: 4}\n")
    assert cli.main(["train", "--config", str(tmp_path / "c.yaml")]) == 2
    said = f"{tmp_path / 'c.yaml'}: unknown key 'generator.base_chanels': did you mean 'generator.base_channels'?"
    assert said in sentence()
    (tmp_path / "c.yaml").write_text("data: shapes\nout: x\nbatch_size: many\n")
    assert cli.main(["train", "--config", str(tmp_path / "c.yaml")]) == 2
    assert f"{tmp_path / 'c.yaml'}: batch_size must be a whole number, got 'many'" in sentence()


def test_a_number_or_a_word(sentence):
    assert cli.main(["train", "--preset=shapes-32", "--out=x", "--micro-batch-size=most"]) == 2
    assert "--micro-batch-size must be a whole number or auto, got 'most'" in sentence()


def test_dashes_in_names_only():
    assert underscored(["--batch-size=3", "--out", "a-b", "--x-y=a-b"]) == [
        "--batch_size=3",
        "--out",
        "a-b",
        "--x_y=a-b",
    ]


def test_a_files_values_as_options():
    assert as_options({"a": {"b": [1, 2]}, "c": "word", "d": None, "e": True}) == [
        "--a.b=[1, 2]",
        "--c=word",
        "--e=true",
    ]


@dataclass
class Options:
    """Do something.

    Then something else.
    """

    run: str
    """the run"""
    out: str
    """where to"""
    folder: str | None = None
    """a place"""
    count: int | None = None
    """how many"""
    share: float = 0.5
    """a part"""
    at_most: int = 7
    """the highest"""
    device: Device = "auto"
    """where"""
    network: Device | None = None
    """which"""
    last: bool = False
    """a flag"""


def read(*args):
    return read_options("try", Options, underscored(list(args)), positional=("run", "folder"))


def test_the_fields_of_a_dataclass_are_the_options():
    assert read("r", "--out", "5") == Options(run="r", out="5")
    args = ["--last", "r", "f", "--out=o", "--count=-3", "--share", "1e-3", "--device", "cpu", "--network=cuda"]
    assert read(*args) == Options("r", "o", "f", -3, 0.001, 7, "cpu", "cuda", True)


def test_the_docstrings_are_the_help(capsys):
    with pytest.raises(SystemExit):
        read("--help")
    said = " ".join(capsys.readouterr().out.split())
    assert "Do something. Then something else." in said and "-h, --help" in said
    assert (
        "--device {auto,cpu,cuda,mps} where (default: auto) --network {auto,cpu,cuda,mps} which --last a flag" in said
    )
    assert "--count N how many --share X a part (default: 0.5) --at-most N the highest (default: 7)" in said
    assert "[folder]" in said and "Literal" not in said and "null" not in said and "type:" not in said


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["r", "--out=o", "--count=z"], "--count must be a whole number, got 'z'"),
        (["r", "--out=o", "--count=1.5"], "--count must be a whole number, got '1.5'"),
        (["r", "--out=o", "--share=z"], "--share must be a number, got 'z'"),
        (["r", "--out=o", "--device=tpu"], "--device must be one of auto, cpu, cuda, mps, got 'tpu'"),
        (["r", "--out=o", "--network=tpu"], "--network must be one of auto, cpu, cuda, mps, got 'tpu'"),
        (["r"], "--out must be given"),
        (["--out=o"], "run must be given"),
        (["r", "--ou=o"], "unknown option --ou: did you mean '--out'?"),
        (["r", "--out=o", "--cout", "3"], "unknown option --cout: did you mean '--count'?"),
        (["r", "--out"], "--out must be followed by a value"),
        (["r", "--out=o", "--at-most=z"], "--at-most must be a whole number, got 'z'"),
        (["r", "f", "g", "--out=o"], "what is 'g' for? This command takes no further argument"),
    ],
)
def test_whatever_is_wrong_is_a_sentence(args, message):
    with pytest.raises(InputError) as error:
        read(*args)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--precision=fp8"], "--precision must be one of auto, fp32, tf32, bf16, fp16, got 'fp8'"),
        (["--flip=maybe"], "--flip must be true or false, got 'maybe'"),
        (
            ["--generator.channel_multipliers=wide"],
            "--generator.channel-multipliers must be a list such as [8,16], got",
        ),
    ],
)
def test_of_train_too(args, message, sentence):
    assert cli.main(["train", "--preset", "shapes-32", "--out", "x", *args]) == 2
    assert message in sentence()


@pytest.mark.parametrize(
    ("message", "typed"),
    [
        ("count must be at least 1", "--count must be at least 1"),
        ("r: at_most must be 3; take fewer than at_most.", "r: at_most must be 3; take fewer than --at-most."),
        ("two of at_most and at_mostly", "two of --at-most and at_mostly"),
        ("x is too much; at_most=3 is less", "x is too much; --at-most=3 is less"),
        ("the count must be 3 for 'at_most', a/at_most, at_most/b, at_most.png and at_most()", None),
        ("share 3 is a class, device too", None),
        ("run must be given", None),  # it is given without a name
    ],
)
def test_options_in_a_message_are_written_as_typed(message, typed):
    read("r", "--out=o")
    assert as_typed(message) == (typed or message)


def test_nothing_needs_pytorch_before_it_computes():
    program = """
import contextlib, io, sys
from sagan_fast import cli
from sagan_fast.version import __version__
for args in (["--version"], ["--help"], ["tran"], *([command, "--help"] for command in cli.COMMANDS)):
    said = io.StringIO()
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        cli.main(args)
    expected = {"--version": f"sagan-fast {__version__}", "tran": "did you mean 'train'?"}
    assert expected.get(args[0], f"usage: sagan-fast {args[0] if args[1:] else '{prepare,'}") in said.getvalue(), args
    assert "torch" not in sys.modules, args
"""
    subprocess.run([sys.executable, "-c", program], check=True)
