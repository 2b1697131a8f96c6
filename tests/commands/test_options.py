"""Unknown keys are named with their nearest known one."""

from sagan_fast import cli
from sagan_fast.commands.options import as_options, underscored


def test_an_unknown_key_in_a_file_names_the_nearest(tmp_path, sentence):
    (tmp_path / "c.yaml").write_text("data: shapes\nout: x\ngenerator: {base_chanels: 4}\n")
    assert cli.main(["train", "--config", str(tmp_path / "c.yaml")]) == 2
    assert "unknown key 'generator.base_chanels': did you mean 'generator.base_channels'?" in sentence()


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
