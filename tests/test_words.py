"""Numbers with their nouns, and that sentences take them from one place."""

from pathlib import Path

from sagan_fast.words import counted, list_some

SOURCES = Path(__file__).parents[1] / "sagan_fast"
NOUNS = "images faces threads steps crops pictures photographs rows paths checkpoints tensors samples epochs lines keys"
MANY_ANYWAY = {
    "commands/attention.py": 0,
}


def test_a_number_has_its_noun():
    assert counted(1, "image") == "1 image"
    assert counted(0, "image") == "0 images"
    assert counted(1, "class", "classes") == "1 class"
    assert counted(2, "class", "classes") == "2 classes"


def test_a_long_list_is_cut_short():
    assert list_some(["a", "b"]) == "a, b"
    assert list_some(list("abcdef")) == "a, b, c, d, ..."
