"""The published weights and scikit-image's pictures, where they are, and random weights."""

import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from sagan_fast.faces import FaceBoxes

HERE = Path(__file__).parents[2]
FOLDER = Path(os.environ.get("SAGAN_FAST_FACEBOXES", HERE / ".." / "shared" / "data" / "faceboxes"))
WEIGHTS = FOLDER / "FaceBoxesProd.pth"


@pytest.fixture(scope="session")
def weights():
    """The file of the published weights."""
    if not WEIGHTS.is_file():
        pytest.skip(f"the published weights are not at {WEIGHTS}; SAGAN_FAST_FACEBOXES names their folder")
    return WEIGHTS


@pytest.fixture(scope="session")
def photographs():
    """scikit-image's folder of pictures, read as files: the package itself is not imported."""
    found = find_spec("skimage")
    if found is None:
        pytest.skip("scikit-image is not installed")
    return Path(found.submodule_search_locations[0]) / "data"


@pytest.fixture
def trained(generator):
    """A network with weights and statistics of the size of trained ones, in evaluation."""
    return random_network(generator)


def random_network(generator):
    net = FaceBoxes()
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, torch.nn.Conv2d):
                fan_in = module.weight[0].numel()
                module.weight.normal_(0, (1.5 / fan_in) ** 0.5, generator=generator)
            elif isinstance(module, torch.nn.BatchNorm2d):
                module.weight.uniform_(0.3, 1.3, generator=generator)
                module.bias.normal_(0, 0.3, generator=generator)
                module.running_mean.normal_(0, 0.5, generator=generator)
                module.running_var.uniform_(0.5, 2, generator=generator)
        net.conv1.bn.running_var.mul_(60**2)  # the input is in 0 to 255
    return net.eval()


@pytest.fixture(scope="session")
def random_weights(tmp_path_factory):
    """A file of random weights, which find whatever they find."""
    path = tmp_path_factory.mktemp("weights") / "random.pth"
    torch.save(random_network(torch.Generator().manual_seed(1)).state_dict(), path)
    return path
