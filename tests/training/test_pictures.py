"""What the pictures of a run show."""

import json
import types

import numpy as np
import torch
from PIL import Image

from sagan_fast.data import open_dataset
from sagan_fast.distributed import World
from sagan_fast.training.config import TrainConfig
from sagan_fast.training.pictures import sampled, save_data, show_samples
from sagan_fast.training.state import new_state


def test_the_picture_of_the_data_shows_what_the_labels_say(tmp_path):
    for value, name in enumerate(("ant", "bee", "cow")):
        (tmp_path / "real" / name).mkdir(parents=True)
        Image.new("L", (64, 64), 40 + 60 * value).save(tmp_path / "real" / name / "1.png")
    (tmp_path / "real" / "cow" / "1.png").write_text("no image")
    save_data(open_dataset(f"folder:{tmp_path / 'real'}", resolution=64), tmp_path / "data.png")
    picture = np.asarray(Image.open(tmp_path / "data.png").convert("L"))
    right = [np.unique(part[:, -64 * 7 :]).tolist() for part in np.array_split(picture[6:-6], 3)]
    assert 40 in right[0] and 100 in right[1] and right[2] == [255]
    assert (picture[:, :60] < 128).any()  # the names
    found = json.loads((tmp_path / "data.json").read_text())
    assert found["classes"] == {"ant": 1, "bee": 1, "cow": 1} and found["labels_from"] == "sub-folders"


def test_a_run_shows_its_samples_with_names_and_what_they_look_at(tmp_path):
    narrow = {"base_channels": 2}
    config = TrainConfig.from_preset("shapes-32", out="x", generator=narrow, discriminator=narrow, sample_every=5)
    state, shown = new_state(config, torch.device("cpu")), {}
    state.step = 5
    data = types.SimpleNamespace(class_names=open_dataset("shapes", resolution=32).class_names)
    run = types.SimpleNamespace(state=state, config=config, dataset=data, world=World(torch.device("cpu")))
    log = types.SimpleNamespace(picture=lambda name, image, step: shown.update({name: (image, step)}))
    before = torch.get_rng_state()
    show_samples(run, log, tmp_path / "s.png")
    assert torch.equal(before, torch.get_rng_state())  # the run is not disturbed
    picture, step = shown["samples"]
    assert step == 5 and picture.shape[1] == 10 * 66 - 2 + 12
    assert picture.shape[2] > 8 * 66 + 60  # room for the names
    figure, _ = shown["attention/generator.attentions.16"]
    assert figure.dtype == torch.uint8 and figure.shape[1] > 4 * 160


def test_grids_show_all_classes_in_turn():
    config = TrainConfig.from_preset("official-128-feat32", out="x", data="shapes", num_classes=25)
    seen = [sampled(config, turn) for turn in range(3)]
    assert [y.unique_consecutive().tolist() for _, y in seen] == [
        list(range(10)), list(range(10, 20)), [*range(20, 25), *range(5)]
    ]  # fmt: skip
    assert all(torch.equal(z, seen[0][0]) for z, _ in seen) and len(seen[0][1]) == len(seen[0][0]) == 80
    few = TrainConfig.from_preset("shapes-32", out="x")
    assert all(torch.equal(sampled(few, turn)[1], torch.arange(10).repeat_interleave(8)) for turn in (0, 7))
    assert sampled(TrainConfig.from_preset("shapes-32", out="x", num_classes=0), 3)[1] is None
