"""Training learns: eight drawn pictures by heart, and from nothing to find faces it has never seen."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from face_pictures import composed, drawn_picture

from sagan_fast.data.loader import epoch_order
from sagan_fast.errors import Diverged, InputError
from sagan_fast.faces import FaceBoxes
from sagan_fast.faces.train import LAST, Lines, Recipe, score, train
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
    told, said = [], []
    whole, step = train(pictures, TINY, out=tmp_path / "whole", log_every=1, on_line=lambda *line: told.append(line))
    assert [step for step, _ in told] == [1, 2, 3, 4] and step == 4 and not whole.training
    assert told[0][1]["loss"] == pytest.approx(2 * told[0][1]["location"] + told[0][1]["confidence"])
    calls, cut = iter([False, True]), tmp_path / "cut"
    assert train(pictures, TINY, out=cut, stop=lambda: next(calls))[1] == 2
    with (cut / "log.jsonl").open("a") as log:  # of steps after the last write, and of a line that was cut off
        log.write('{"step": 3}\n{"ste')
    resumed, step = train(pictures, TINY, out=cut, resume=True, say=said.append)
    assert same(whole, resumed) and step == 4 and said == [f"{cut / LAST}: going on at step 2"]
    assert same(whole, FaceBoxes().load_weights(tmp_path / "whole" / LAST))
    assert [json.loads(x)["step"] for x in (cut / "log.jsonl").read_text().splitlines()] == [1, 2, 3, 4]
    faster = dataclasses.replace(TINY, lr=2e-3)
    assert same(train(pictures, faster, out=cut, resume=True, say=said.append)[0], resumed)
    assert said[-1] == f"{cut / LAST}: going on at step 4; lr 0.001 is now 0.002"


def test_a_line_has_the_means_since_the_line_before(tmp_path):
    told = []
    lines = Lines(tmp_path, 3, lambda *line: told.append(line))
    for step, loss in enumerate((6.0, 1.0, 3.0, 7.0, 9.0), 1):
        lines.add(step, {"loss": loss}, lr=step / 10, due=step in (1, 5))
    assert [(step, line["loss"], line["lr"]) for step, line in told] == [(1, 6, 0.1), (3, 2, 0.3), (5, 8, 0.5)]
    assert [json.loads(line)["loss"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [6, 2, 8]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_that_cannot_be_read_is_one_sentence_and_nothing_is_lost(tmp_path, rng, workers):
    gone = Picture(tmp_path / "gone.jpg", np.array([[1, 2, 30, 40]], np.float32))
    with pytest.raises(InputError, match=r"^\S*gone.jpg cannot be read: No such file or directory; --on-broken skip"):
        train([gone], TINY, num_workers=workers)
    pictures, one = drawn(3, rng), dataclasses.replace(TINY, batch_size=1, size=160)
    order = epoch_order(4, one.seed, 0)
    pictures.insert(int(order[2]), gone)  # the third step needs it
    with pytest.raises(InputError, match=r"gone.jpg cannot be read"):
        train(pictures, one, out=tmp_path / "run", num_workers=workers)
    assert torch.load(tmp_path / "run" / LAST, weights_only=True)["step"] == 2
    said = []
    kwargs = {"out": tmp_path / "run", "num_workers": workers, "resume": True, "on_broken": "skip", "say": said.append}
    assert train(pictures, one, **kwargs)[1] == 4
    assert said == [
        f"{tmp_path / 'run' / LAST}: going on at step 2",
        f"left out: {gone.path} cannot be read: No such file or directory",
    ]


def test_a_score_without_the_pictures_that_cannot_be_read(tmp_path, rng, trained):
    gone, said = Picture(tmp_path / "gone.jpg", np.array([[1, 2, 30, 40]], np.float32)), []
    pictures = drawn(2, rng, 64)
    with pytest.raises(InputError, match="gone.jpg cannot be read"):
        score(trained, [*pictures, gone])
    found = score(trained, [*pictures, gone], on_broken="skip", say=said.append)
    assert found == score(trained, pictures) and said == [
        f"left out: {gone.path} cannot be read: No such file or directory"
    ]


def test_what_cannot_be_trained(tmp_path, rng):
    with pytest.raises(InputError, match="there is no face"):
        train([Picture(Path("x"), np.zeros((0, 4), np.float32), np.zeros((9, 9, 3), np.uint8))], TINY)
    with pytest.raises(Diverged, match="try a smaller --lr"):
        train(drawn(2, rng), dataclasses.replace(TINY, lr=1e30, warmup=0))
    torch.save(FaceBoxes().state_dict(), tmp_path / LAST)
    with pytest.raises(InputError, match="without the state of a training"):
        train(drawn(1, rng), TINY, out=tmp_path, resume=True)
    with pytest.raises(InputError, match=f"cannot write to {tmp_path / LAST}: "):  # before the first step
        train(drawn(1, rng), TINY, out=tmp_path / LAST)
    for wrong in ({"lr": 0}, {"steps": 0}, {"size": 16}, {"batch_size": 1, "size": 128}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            Recipe(**wrong)


@pytest.mark.slow
def test_eight_drawn_pictures_are_learned_by_heart(rng, monkeypatch):
    """Without augmentation, every face of the eight is found and nothing else."""
    pictures = drawn(8, rng)

    def whole(pixels, faces, size, rng):
        from sagan_fast.faces.pictures import as_input

        return as_input(pixels)[0].flip(0), torch.from_numpy(faces)

    monkeypatch.setattr("sagan_fast.faces.samples.augment", whole)
    net, _ = train(pictures, Recipe(steps=120, batch_size=8, size=256, lr=0.02, decay_at=(90,), warmup=10))
    found = score(net, pictures, min_score=0.5)
    assert found.recall == 1 and found.wrong == 0, found


@pytest.mark.slow
def test_from_nothing_to_faces_never_seen(photographs, rng):
    """Faces and backgrounds of the score are held out; minutes on two cores."""
    pictures = composed(photographs, True, 400, 320, (28, 130), rng)
    unseen = composed(photographs, False, 60, 256, (28, 120), rng)
    net, _ = train(pictures, Recipe(steps=1000, batch_size=16, size=256, lr=0.02, decay_at=(750, 920), warmup=50))
    found = score(net, unseen)
    assert found.average_precision >= 0.7, found
