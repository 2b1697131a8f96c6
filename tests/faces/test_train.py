"""Training learns: eight drawn pictures by heart, and from nothing to find faces it has never seen."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from face_pictures import composed, drawn_picture

from sagan_fast.errors import Diverged, InputError
from sagan_fast.faces import FaceBoxes
from sagan_fast.faces.train import LAST, Augmented, Recipe, score, train
from sagan_fast.faces.wider import Picture

TINY = Recipe(steps=4, batch_size=2, size=64, lr=1e-3, decay_at=(2,), warmup=2)


def drawn(count, rng, size=256):
    return [Picture(Path("drawn"), faces, pixels) for pixels, faces in (drawn_picture(rng, size) for _ in range(count))]


def same(a, b):
    return all(torch.equal(value, b.state_dict()[key]) for key, value in a.state_dict().items())


def test_the_learning_rate_steps_down():
    recipe = Recipe()
    assert [recipe.lr_at(s) for s in (0, 79_999, 80_000, 100_000)] == pytest.approx([1e-3, 1e-3, 1e-4, 1e-5])
    assert [TINY.lr_at(s) for s in range(4)] == pytest.approx([5e-4, 1e-3, 1e-4, 1e-4])


def test_a_resumed_training_is_the_uninterrupted_one(tmp_path, rng):
    pictures = drawn(5, rng)
    told = []
    whole = train(pictures, TINY, out=tmp_path / "whole", on_step=lambda step, values: told.append((step, values)))
    assert [step for step, _ in told] == [1, 2, 3, 4] and not whole.training
    assert told[0][1]["loss"] == pytest.approx(2 * told[0][1]["location"] + told[0][1]["confidence"])
    calls = iter([False, True])
    train(pictures, TINY, out=tmp_path / "cut", stop=lambda: next(calls))
    resumed = train(pictures, TINY, out=tmp_path / "cut", resume=True)
    assert same(whole, resumed)
    assert same(whole, FaceBoxes().load_weights(tmp_path / "whole" / LAST))
    assert [json.loads(x)["step"] for x in (tmp_path / "cut" / "log.jsonl").read_text().splitlines()] == [2, 4]


def test_samples_depend_on_seed_and_place_alone(rng):
    pictures = drawn(3, rng)
    a, b, c = (Augmented(pictures, 64, seed) for seed in (1, 1, 2))
    b[0]
    assert torch.equal(a[5][0], b[5][0]) and not torch.equal(a[5][0], c[5][0])
    seen = {next(i for i, p in enumerate(pictures) if p is pictures[int(k)]) for k in range(3)}
    assert seen == {0, 1, 2}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_that_cannot_be_read_is_one_sentence(tmp_path, rng, workers):
    gone = Picture(tmp_path / "gone.jpg", np.array([[1, 2, 30, 40]], np.float32))
    with pytest.raises(InputError, match=r"^\S*gone.jpg cannot be read: No such file or directory$"):
        train([gone], TINY, num_workers=workers)


def test_what_cannot_be_trained(tmp_path, rng):
    with pytest.raises(InputError, match="there is no face"):
        train([Picture(Path("x"), np.zeros((0, 4), np.float32), np.zeros((9, 9, 3), np.uint8))], TINY)
    with pytest.raises(Diverged, match="try a smaller --lr"):
        train(drawn(2, rng), dataclasses.replace(TINY, lr=1e30, warmup=0))
    torch.save(FaceBoxes().state_dict(), tmp_path / LAST)
    with pytest.raises(InputError, match="without the state of a training"):
        train(drawn(1, rng), TINY, out=tmp_path, resume=True)
    for wrong in ({"lr": 0}, {"steps": 0}, {"size": 16}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            Recipe(**wrong)


@pytest.mark.slow
def test_eight_drawn_pictures_are_learned_by_heart(rng, monkeypatch):
    """Without augmentation, every face of the eight is found and nothing else."""
    pictures = drawn(8, rng)

    def whole(pixels, faces, size, rng):
        from sagan_fast.faces.pictures import as_input

        return as_input(pixels)[0].flip(0), torch.from_numpy(faces)

    monkeypatch.setattr("sagan_fast.faces.train.augment", whole)
    net = train(pictures, Recipe(steps=120, batch_size=8, size=256, lr=0.02, decay_at=(90,), warmup=10))
    found = score(net, pictures, min_score=0.5)
    assert found.recall == 1 and found.wrong == 0, found


@pytest.mark.slow
def test_from_nothing_to_faces_never_seen(photographs, rng):
    """Faces and backgrounds of the score are held out; minutes on two cores."""
    pictures = composed(photographs, True, 400, 320, (28, 130), rng)
    unseen = composed(photographs, False, 60, 256, (28, 120), rng)
    net = train(pictures, Recipe(steps=1000, batch_size=16, size=256, lr=0.02, decay_at=(750, 920), warmup=50))
    found = score(net, unseen)
    assert found.average_precision >= 0.7, found
