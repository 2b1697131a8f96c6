"""The model in memory gives what the commands give, and a sample is the same however it is asked for."""

import copy
import io
from collections import OrderedDict

import pytest
import torch
from PIL import Image

from sagan_fast.errors import InputError
from sagan_fast.evaluation.sampling import latents, sample
from sagan_fast.models.checkpoint import load_discriminator, load_generator
from sagan_fast.models.generator import Generator
from sagan_fast.view.model import COLUMNS, KEPT, MOST, PER_SEED, Model
from sagan_fast.visualize.attention_maps import attention_input, attention_layer
from sagan_fast.visualize.grids import to_uint8


@pytest.fixture(scope="module")
def model(tiny_run):
    return Model(tiny_run, torch.device("cpu"))


def nearly(a, b):
    """Batches of other sizes round differently: by one grey level at most."""
    return (a.int() - b.int()).abs().max() <= 1


def test_samples_are_the_generators_for_the_same_z(model, tiny_run):
    found = model.samples([2, 5], 3, 7, None)
    z = latents(PER_SEED, 128, 7)[:3].repeat(2, 1)
    generator = load_generator(tiny_run)
    truth = to_uint8(torch.cat(list(sample(generator, z, torch.tensor([2, 2, 2, 5, 5, 5])))))
    assert [str(chosen) for chosen, _ in found] == ["2.7.0", "2.7.1", "2.7.2", "5.7.0", "5.7.1", "5.7.2"]
    assert nearly(torch.stack([image for _, image in found]), truth)


def test_a_path_begins_and_ends_at_its_samples(model):
    (_, start), (_, end) = model.samples([1], 1, 0, 0.7)[0], model.samples([4], 3, 9, 0.7)[2]
    frames = model.between("1.0.0", "4.9.2", 5, 0.7)
    assert frames.shape == (5, 3, 32, 32) and nearly(frames[0], start) and nearly(frames[-1], end)
    assert not torch.equal(frames[0], frames[-1])


@pytest.mark.parametrize("network", ["g", "d"])
def test_attention_is_that_row_of_the_map(model, tiny_run, network):
    image = model.samples([3], 1, 5, None)[0][1]
    if network == "g":
        shown, inputs = load_generator(tiny_run), (latents(PER_SEED, 128, 5)[:1], torch.tensor([3]))
    else:
        shown, inputs = load_discriminator(tiny_run), (image[None].float() / 127.5 - 1, torch.tensor([3]))
    _, layer = attention_layer(shown)
    x, out = attention_input(shown, layer, *inputs)
    row = layer.attention_map(x, [5 * 16 + 11])[0, 0]
    found = model.attention(network, None, "3.5.0", 0, None, 22.5, 10.0)
    assert (found["x"], found["y"], found["cells"]) == (23.0, 11.0, 16)
    assert found["peak"] == pytest.approx(float(row.max() * len(row)), rel=1e-4)
    assert found["half"] == pytest.approx(int((row.sort(descending=True).values.cumsum(0) < 0.5).sum() + 1) / 64)
    assert found["gamma"] == pytest.approx(float(layer.gamma)) and found["small"] is (abs(found["gamma"]) < 0.01)
    assert found["picture"].shape == found["map"].shape == (3, 320, 320)
    assert nearly(found["picture"][:, ::10, ::10], image)
    if network == "d":
        assert found["score"] == pytest.approx(float(out), rel=1e-3, abs=1e-5)


def test_real_images_are_kept_in_memory_the_newest_only(model):
    out = io.BytesIO()
    Image.new("RGB", (32, 32), (255, 0, 0)).save(out, "PNG")
    name, picture, said = model.keep(out.getvalue())
    assert picture[:, 0, 0].tolist() == [255, 0, 0] and said == "32 x 32 pixels"
    scores = {model.attention("d", None, name, k, None, 0, 0)["score"] for k in (0, 1)}
    assert len(scores) == 2, "the score depends on the class"
    for _ in range(KEPT):
        model.keep(out.getvalue())
    with pytest.raises(InputError, match="no longer kept"):
        model.attention("d", None, name, 5, None, 0, 0)


def test_reading_does_not_change_the_networks(model):
    before = {name: value.clone() for name, value in model.generator.state_dict().items()}
    model.samples([0], 2, 0, None)
    model.attention("g", None, "0.0.0", 0, None, 0, 0)
    assert not model.generator.training
    assert all(torch.equal(value, before[name]) for name, value in model.generator.state_dict().items())


def test_the_number_of_samples_fits_the_machine(model, monkeypatch):
    for seconds, count in ((0.001, MOST), (0.002, MOST), (0.025, 8), (0.1, 4)):
        monkeypatch.setattr(model, "_seconds", lambda chosen, each=seconds: each * len(chosen))
        assert model._affordable() == count
    assert model.about()["columns"] == COLUMNS


def test_a_model_without_classes(tiny_run, monkeypatch):
    small = {"num_classes": 0, "base_channels": 4}
    made = Generator.from_preset("shapes-32", **small).eval().requires_grad_(False)
    monkeypatch.setattr("sagan_fast.view.model.generator_source", lambda *args: (made, {}))
    monkeypatch.setattr("sagan_fast.view.model.is_exported", lambda source: True)
    model = Model(tiny_run, torch.device("cpu"))
    found = model.samples([None] * 2, 3, 1, None)
    assert [str(chosen) for chosen, _ in found] == [f"-.1.{i}" for i in range(6)]
    assert model.about()["classes"] == [] and model.about()["step"] is None
    assert len(model.between("-.1.0", "-.1.1", 3, None)) == 3
    with pytest.raises(InputError, match="must have no class"):
        model.between("0.1.0", "-.1.1", 3, None)
    with pytest.raises(InputError, match="no classes"):
        model.chosen_class(0)


def test_weights_that_are_not_numbers_are_a_sentence(model):
    broken, name = copy.copy(model), "3.5.0"
    broken.discriminator, broken._seen = copy.deepcopy(model.discriminator), OrderedDict()
    with torch.no_grad():
        for parameter in broken.discriminator.parameters():
            parameter.fill_(float("nan"))
    with pytest.raises(InputError, match="the discriminator gives numbers that are not finite: its weights have"):
        broken.attention("d", None, name, 0, None, 5.0, 5.0)
