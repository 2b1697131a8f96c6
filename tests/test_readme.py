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


def test_pictures_and_presets_exist():
    from sagan_fast.models.config import preset_names

    for picture in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (ROOT / picture).exists(), picture
    for name in preset_names():
        assert f"`{name}`" in README, name
