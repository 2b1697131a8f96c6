"""GAN-test: right images are recognised, swapped classes are not, and what cannot be compared is a sentence."""

import numpy as np
import pytest
import torch

from sagan_fast.data.dataset import ImageDataset
from sagan_fast.distributed import World
from sagan_fast.errors import InputError
from sagan_fast.evaluation import gan_test
from sagan_fast.evaluation.gan_test import SIDE, Classifier, recognised, train_classifier, with_gan_test
from sagan_fast.evaluation.protocol import Protocol
from sagan_fast.evaluation.streams import StoredImages

COLOURS = torch.tensor([[220, 40, 40], [40, 220, 40], [40, 40, 220]])
ALONE = World(torch.device("cpu"))


class Colours(ImageDataset):
    """Noise around one colour per class; `shown` says which colour an image of each class really has."""

    def __init__(self, per_class=20, names=("red", "green", "blue"), shown=(0, 1, 2), resolution=8, short=0):
        labels = np.arange(per_class * len(names)) % max(len(names), 1) if names else np.zeros(per_class, np.int64)
        labels = labels[: len(labels) - short]
        super().__init__("colours", resolution=resolution, class_names=names, labels=labels)
        self.shown = [shown[label] for label in labels]

    def load(self, index):
        noise = torch.randint(-30, 31, (3, self.resolution, self.resolution))
        return (COLOURS[self.shown[index]][:, None, None] + noise).clamp(0, 255).byte()


@pytest.fixture(autouse=True)
def shorter(monkeypatch):
    monkeypatch.setattr(gan_test, "IMAGES_SEEN", 1500)


def quiet(label, count):
    return lambda done: None


def score(generated, real, result=None, world=ALONE):
    stored = StoredImages(generated)
    what = {
        "generated": stored, "dataset": real, "protocol": Protocol.preset("clean", count=max(stored.count, 10)),
        "num_workers": 0, "source": {"data": generated.name},
    }  # fmt: skip
    return with_gan_test({} if result is None else result, what, world, quiet)


def test_right_images_are_recognised_and_swapped_classes_are_not():
    real = Colours()
    same = score(Colours(), real, {"fid": 1.0, "notes": ["a"], "protocol": {"name": "clean"}})
    assert same["gan_test"] == 1 and same["gan_test_real"] == 1 and same["gan_test_of"] == 60
    assert same["fid"] == 1.0 and same["notes"] == ["a"]
    assert same["protocol"]["gan_test"]["real_images"] == 60 and same["protocol"]["name"] == "clean"
    swapped = score(Colours(shown=(0, 2, 1)), real)
    assert swapped["gan_test_per_class"] == {"red": 1, "green": 0, "blue": 0}
    assert swapped["gan_test"] == pytest.approx(1 / 3) and swapped["protocol"]["generated"] == {"data": "colours"}


def test_classes_are_compared_by_name_and_others_are_left_out():
    found = score(Colours(names=("blue", "violet", "red"), shown=(2, 1, 0)), Colours())
    assert found["gan_test_per_class"] == {"red": 1, "blue": 1} and found["gan_test_of"] == 40


def test_of_many_images_each_class_has_its_part(monkeypatch):
    """A random choice of all would leave out classes that are rare, or one of very many."""
    monkeypatch.setattr(gan_test, "MAX_REAL", 30)
    real = Colours(per_class=400)
    real.labels = np.repeat([0, 1, 2], [1180, 12, 8])
    real.shown = real.labels.tolist()
    found = score(Colours(), real)
    assert found["gan_test"] == 1 and found["protocol"]["gan_test"]["real_images"] == 10 + 10 + 8


def test_processes_share_the_generated_images():
    class Second(World):
        """The second of two processes sees every other batch; the first has found 4 of 8."""

        def from_main(self, work):
            return work()

        def gather(self, content):
            gathered.append(content)
            return [(torch.tensor([[4, 0, 0], [8, 0, 0]]), ""), content]

    gathered = []
    generated = Colours(per_class=50)  # batches of 64, 64 and 22
    assert score(generated, Colours(), world=Second(torch.device("cpu"), 1, 2)) is None
    assert int(gathered[0][0][1].sum()) == 64


def test_an_image_that_cannot_be_made_ends_every_process():
    class Broken(Colours):
        def load(self, index):
            raise InputError("image 0 is cut")

    with pytest.raises(InputError, match="^image 0 is cut$"):
        score(Broken(), Colours())


@pytest.mark.parametrize(
    ("generated", "real", "sentence"),
    [
        ({}, {"names": ()}, "needs real images of two or more classes, and colours has no such classes"),
        ({}, {"names": ("red",)}, "needs real images of two or more classes"),
        ({"names": ()}, {}, "needs generated images with classes, and these have none"),
        ({"names": ("a", "b", "c")}, {}, "no class of the generated images is one of colours"),
        ({}, {"per_class": 5, "short": 1}, "at least 5 real images of each class, and colours has fewer of blue"),
    ],
)
def test_what_cannot_be_compared(generated, real, sentence):
    with pytest.raises(InputError, match=f"^gan-test .*{sentence}"):
        score(Colours(**generated), Colours(**real))


def test_the_classifier_is_the_same_for_a_seed_and_leaves_the_random_state_alone():
    labels = torch.arange(60) % 3
    images = (COLOURS[labels][:, :, None, None].expand(60, 3, 8, 8)).byte()
    before = torch.get_rng_state()
    one, other, third = (train_classifier(images, labels, 3, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    weights = [each[0].state_dict()["0.weight"] for each in (one, other, third)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert not one[0].training and one[1] == 1


def test_held_out_images_are_not_learnt():
    """With labels at random a classifier recognises held-out images by chance alone, whatever it has learnt."""
    labels = torch.arange(400) % 2
    images = torch.randint(0, 256, (400, 3, 8, 8)).byte()
    assert train_classifier(images, labels, 2)[1] < 0.75  # 80 images by chance: 0.5, deviation 0.056


def test_too_few_images_of_a_class():
    with pytest.raises(ValueError, match="labels must have at least 5 of a class, got 4"):
        train_classifier(torch.zeros(9, 3, 8, 8, dtype=torch.uint8), torch.tensor([0] * 5 + [1] * 4), 2)


@pytest.mark.parametrize("resolution", [8, 21, SIDE, 2 * SIDE])
def test_any_resolution_is_classified_as_bytes_or_floats(resolution):
    network = Classifier(4).eval()
    images = torch.randint(0, 256, (3, 3, resolution, resolution)).byte()
    assert torch.equal(recognised(network, images), recognised(network, images.float()))
