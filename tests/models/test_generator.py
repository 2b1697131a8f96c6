import pytest
import torch

from sagan_fast import Discriminator, Generator


def test_parameter_counts_are_the_official_ones():
    with torch.device("meta"):
        counts = {
            name: sum(p.numel() for p in Generator.from_preset(name).parameters())
            for name in ("official-128-feat32", "official-128-feat64")
        }
    assert counts == {"official-128-feat32": 42_078_852, "official-128-feat64": 42_017_412}


@pytest.mark.parametrize("name", ["demo-32", "shapes-32", "cifar-32", "tiny-imagenet-64"])
def test_images_are_of_the_presets_size_and_in_range(name):
    model = Generator.from_preset(name, base_channels=4)
    out = model(torch.randn(3, 128), torch.tensor([0, 1, 2]))
    size = model.config.resolution
    assert out.shape == (3, 3, size, size) and out.abs().max() <= 1 and out.std() > 0.01


def test_unconditional():
    model = Generator.from_preset("shapes-32", num_classes=0)
    assert model(torch.randn(2, 128)).shape == (2, 3, 32, 32)
    assert not any("gain" in name for name, _ in model.named_parameters())
    with pytest.raises(ValueError, match=r"Generator: y must be None \(unconditional\), got \(2,\)"):
        model(torch.randn(2, 128), torch.zeros(2, dtype=torch.long))


def test_one_class_is_not_spread_over_several_z():
    model = Generator.from_preset("shapes-32", base_channels=4)
    for count in (1, 3):
        with pytest.raises(ValueError, match=rf"Generator: y must have one class for each of 2 inputs, got {count}"):
            model(torch.randn(2, 128), torch.zeros(count, dtype=torch.long))
    critic = Discriminator.from_preset("shapes-32", base_channels=4)
    with pytest.raises(ValueError, match=r"Discriminator: y must have one class for each of 2 inputs, got 1"):
        critic(torch.randn(2, 3, 32, 32), torch.zeros(1, dtype=torch.long))


def test_classes_that_are_none_are_refused_in_a_sentence():
    models = (
        Generator.from_preset("shapes-32", base_channels=2),
        Discriminator.from_preset("shapes-32", base_channels=2),
    )
    for model, x in zip(models, (torch.randn(2, 128), torch.randn(2, 3, 32, 32)), strict=True):
        name = type(model).__name__
        with pytest.raises(TypeError, match=rf"{name}: y must be a tensor of classes, such as .*, got list \[0, 1\]"):
            model(x, [0, 1])
        for y, got in (([3, 10], "10"), ([-1, 3], "-1")):
            with pytest.raises(ValueError, match=rf"{name}: y must be classes 0 to 9, got {got}"):
                model(x, torch.tensor(y))
        with pytest.raises(ValueError, match=rf"{name}: weights y must have shape \(B, 10\), got \(2,\)"):
            model(x, torch.tensor([0.0, 1.0]))
        with pytest.raises(ValueError, match=rf"{name}: classes y must have shape \(B,\), got \(2, 1\)"):
            model(x, torch.tensor([[0], [1]]))
        with pytest.raises(
            ValueError, match=rf"{name}: y must have one class for each of 2 inputs, got a single number"
        ):
            model(x, torch.tensor(1))


def test_the_class_changes_the_image_once_the_tables_do():
    model = Generator.from_preset("shapes-32").eval()
    z = torch.randn(1, 128)
    same = [model(z, torch.tensor([c])) for c in (0, 1)]
    torch.testing.assert_close(*same)
    with torch.no_grad():
        model.blocks[0].norm1.gain.weight[1].mul_(2)
    assert not torch.allclose(model(z, torch.tensor([0])), model(z, torch.tensor([1])))


def test_spectral_norm_is_on_every_layer_but_the_norms_tables():
    model = Generator.from_preset("official-128-feat32", base_channels=1)
    bare = [
        name
        for name, module in model.named_modules()
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear, torch.nn.Embedding))
        and not hasattr(module, "parametrizations")
    ]
    assert bare and all(name.endswith((".gain", ".bias")) for name in bare)


def test_attention_stands_where_the_list_says():
    model = Generator.from_preset("shapes-32", attention_resolutions=[8, 32])
    assert list(model.attentions) == ["8", "32"]
    assert model.attentions["8"].channels == 64 and model.attentions["32"].channels == 16
    assert list(Generator.from_preset("shapes-32", attention_resolutions=[]).attentions) == []


def test_errors():
    model = Generator.from_preset("shapes-32")
    with pytest.raises(ValueError, match=r"z must have shape \(B, 128\), got \(2, 64\)"):
        model(torch.zeros(2, 64), torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match=r"y must be \(B,\) classes 0..9, got None"):
        model(torch.zeros(2, 128))
    with pytest.raises(ValueError, match="did you mean 'num_classes'?"):
        Generator.from_preset("shapes-32", num_class=3)
