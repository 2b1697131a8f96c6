"""FD-DINOv2 against torch-fidelity's own figure, with a small network in place of the large one."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from sagan_fast.data import open_dataset
from sagan_fast.errors import InputError
from sagan_fast.evaluation.evaluate import evaluate
from sagan_fast.evaluation.features import open_extractor
from sagan_fast.evaluation.protocol import Protocol
from sagan_fast.evaluation.streams import StoredImages


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 14, stride=14)

    def forward(self, x):
        return self.conv(x).relu().mean((2, 3))


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Lets torch.hub give a small network; with its own weights only if it is asked for them."""
    trained = Small()

    def load(repository, name, pretrained=True):
        assert (repository, name) == ("facebookresearch/dinov2", "dinov2_vitl14")
        network = Small()
        if pretrained:
            network.load_state_dict(trained.state_dict())
        return network

    monkeypatch.setattr(torch.hub, "load", load)
    monkeypatch.setenv("SAGAN_FAST_CACHE", str(tmp_path / "cache"))
    torch.save(trained.state_dict(), tmp_path / "weights.pth")
    return tmp_path


def test_it_is_torch_fidelitys_figure(hub, rng):
    import torch_fidelity

    for name in ("one", "two"):
        (hub / name).mkdir()
        shade = int(rng.integers(20, 90))
        for i in range(12):
            pixels = shade + rng.integers(0, 90, (20, 20, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(hub / name / f"{i:02}.png")
    extractor = open_extractor("dinov2", resize="tf1-bilinear", inception_weights=str(hub / "weights.pth"))
    assert extractor.num_features == 6 and extractor.num_logits == 0 and extractor.identity.name == "dinov2"
    one, two = (open_dataset(f"folder:{hub / name}", resolution=None) for name in ("one", "two"))
    protocol = Protocol.preset("clean", count=12, feature_resize="tf1-bilinear")
    ours = evaluate(StoredImages(one), two, extractor, protocol, metrics=("fid",))
    theirs = torch_fidelity.calculate_metrics(
        input1=str(hub / "one"), input2=str(hub / "two"), feature_extractor="dinov2-vit-l-14", fid=True, cuda=False,
        feature_layer_fid="dinov2", verbose=False, cache=False,
    )  # fmt: skip
    assert ours["fid"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)


def test_what_cannot_be_had(hub, monkeypatch):
    with pytest.raises(InputError, match="there is no file of DINOv2's weights"):
        open_extractor("dinov2", inception_weights=str(hub / "none.pth"))
    torch.save({"a": torch.zeros(1)}, hub / "other.pth")
    with pytest.raises(InputError, match=r"other\.pth does not hold the weights of DINOv2 ViT-L/14"):
        open_extractor("dinov2", inception_weights=str(hub / "other.pth"))

    def no_network(*args, **options):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "load", no_network)
    with pytest.raises(InputError, match=r"DINOv2 cannot be fetched \(no route to host\): on a machine with a network"):
        open_extractor("dinov2")
