"""The README's Python runs as it stands, and what it shows is there."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_drop_in_example_runs(capsys):
    first = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[0]
    names = {}
    exec(first, names)
    assert names["y"].shape == (8, 256, 32, 32) and names["where"].shape == (1, 2, 256)
    assert capsys.readouterr().out.startswith("SelfAttention2d: ")


def test_training_from_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "training.md").read_text(), re.DOTALL)
    names = {}
    exec(example, names)
    assert names["images"].shape == (4, 3, 32, 32) and names["state"].step == 2
    assert (tmp_path / "runs" / "notebook" / "checkpoints" / "last.pt").exists()


def test_the_page_of_training_says_what_the_notes_say():
    from sagan_fast.training.advice import PAGE, Advice
    from sagan_fast.training.config import TrainConfig

    page = " ".join((ROOT / PAGE).read_text().lower().split())
    for _, sentence in Advice(TrainConfig.from_preset("shapes-32", out="x")).signs.values():
        assert re.split("[:;] ", sentence)[0] in page, sentence


def test_pictures_and_presets_exist():
    from sagan_fast.models.config import preset_names

    for picture in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (ROOT / picture).exists(), picture
    for name in preset_names():
        assert f"`{name}`" in README, name


def test_the_lines_of_the_demo_are_those_of_its_preset_and_classes():
    from sagan_fast.data.shapes import CLASS_NAMES
    from sagan_fast.training.config import TrainConfig

    steps = TrainConfig.from_preset("demo-32", out="x").steps
    assert re.findall(r"runs/demo: .* step (?:0 of )?(\d+)[\n;]", README) == [str(steps)] * 2
    (line,) = re.findall(r"^gan-test: 0\.\d+ of \d+ .*", README, re.MULTILINE)
    shares = re.findall(r"([a-z ]+) (\d\.\d\d)", line.partition("by class: ")[2])
    assert [name.strip() for name, _ in shares] == list(CLASS_NAMES)
    assert "--preset demo-32" in (ROOT / "Makefile").read_text()


def test_the_estimate_of_several_gpus_follows_from_its_own_numbers():
    page = (ROOT / "docs" / "multi-node.md").read_text()
    found = re.search(r"`official-128-feat64`.*G ([\d,]+) parameters, D ([\d,]+)\)", README)
    megabytes = 4 * sum(int(count.replace(",", "")) for count in found.groups()) / 1e6
    assert f"S = {megabytes:.0f} MB" in page and f"at most {2 * megabytes:.0f} MB" in page
    links = re.findall(r"\| ([\d.]+) \| ([\d.]+) \|\n", page)
    assert len(links) == 3
    for rate, milliseconds in links:
        digits = len(milliseconds.partition(".")[2])
        assert f"{2 * megabytes / (0.8 * float(rate)):.{digits}f}" == milliseconds
    flop, images, milliseconds = 154.9e9, 64, 64 * 154.9e9 / (0.45 * 989e12) * 1e3
    assert f"needs {milliseconds:.0f} ms for the {flop / 1e9} GFLOP an image of {images} images" in page


def test_the_page_of_data_names_everything_that_is_read():
    from sagan_fast.data import SPECS
    from sagan_fast.data.labels import JSON_KEYS, LABEL_FILES
    from sagan_fast.data.sources import tar, tfrecord

    page = (ROOT / "docs" / "data.md").read_text()
    keys = (*JSON_KEYS, *LABEL_FILES, *tfrecord.IMAGE_KEYS, *tfrecord.LABEL_KEYS, *SPECS.values())
    for name in (*keys, *(f".{ending}" for ending in tar.LABEL_ENDINGS)):
        assert f"`{name}`" in page or f"KEY{name}`" in page, name
