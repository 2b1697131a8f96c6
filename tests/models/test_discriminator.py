import pytest
import torch

from sagan_fast import Discriminator
from shared_by_tests import randn


def test_parameter_counts_are_the_official_ones():
    with torch.device("meta"):
        counts = {
            name: sum(p.numel() for p in Discriminator.from_preset(name).parameters())
            for name in ("official-128-feat32", "official-128-feat64")
        }
    assert counts == {"official-128-feat32": 39_463_618, "official-128-feat64": 39_448_258}


@pytest.mark.parametrize("name", ["demo-32", "shapes-32", "cifar-32", "tiny-imagenet-64"])
def test_one_logit_an_image(name):
    model = Discriminator.from_preset(name, base_channels=4)
    size = model.config.resolution
    assert model(torch.randn(3, 3, size, size), torch.tensor([0, 1, 2])).shape == (3,)


def test_the_head_is_a_projection_of_the_sum_over_the_map(generator):
    model = Discriminator.from_preset("shapes-32").double().eval()
    x, y = randn(2, 3, 32, 32, generator=generator), torch.tensor([3, 7])
    h = x
    for block in model.blocks:
        h = block(h)
        if h.shape[2] == 16:
            h = model.attentions["16"](h)
    h = h.relu().sum((2, 3))
    expected = h @ model.linear.weight[0] + model.linear.bias + (model.embedding.weight[y] * h).sum(1)
    torch.testing.assert_close(model(x, y), expected)


def test_unconditional():
    model = Discriminator.from_preset("shapes-32", num_classes=0)
    assert model.embedding is None and model(torch.randn(2, 3, 32, 32)).shape == (2,)


def test_blocks_that_keep_the_size_get_no_second_attention():
    model = Discriminator.from_preset("cifar-32", attention_resolutions=[8], base_channels=4)
    assert list(model.attentions) == ["8"] and len(model.blocks) == 4
    assert [block.downsample for block in model.blocks] == [True, True, False, False]


def test_spectral_norm_is_on_every_layer():
    model = Discriminator.from_preset("official-128-feat32", base_channels=1)
    layers = (torch.nn.Conv2d, torch.nn.Linear, torch.nn.Embedding)
    assert all(hasattr(m, "parametrizations") for m in model.modules() if isinstance(m, layers))


def test_errors():
    model = Discriminator.from_preset("shapes-32")
    with pytest.raises(ValueError, match=r"x must have shape \(B, 3, 32, 32\), got \(2, 3, 64, 64\)"):
        model(torch.zeros(2, 3, 64, 64), torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match=r"Discriminator: y must be \(B,\) classes 0..9, got None"):
        model(torch.zeros(2, 3, 32, 32))
