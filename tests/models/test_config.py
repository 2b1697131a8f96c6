import pytest

from sagan_fast.errors import InputError
from sagan_fast.models.config import (
    DiscriminatorConfig,
    GeneratorConfig,
    from_mapping,
    load_preset,
    network_config,
    preset_names,
)


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_sizes_both_networks(name):
    recipe = load_preset(name)
    generator = network_config(GeneratorConfig, recipe, "generator")
    discriminator = network_config(DiscriminatorConfig, recipe, "discriminator")
    assert generator.sizes[-1] == generator.resolution == discriminator.resolution
    assert discriminator.sizes[-1] == discriminator.final_size
    assert generator.attention_resolutions and discriminator.attention_resolutions


def test_the_official_widths():
    config = network_config(GeneratorConfig, load_preset("official-128-feat32"), "generator")
    assert config.widths == (1024, 1024, 512, 256, 128, 64) and config.seed_size == 4
    assert config.sizes == (8, 16, 32, 64, 128)


@pytest.mark.parametrize(
    ("cls", "values", "message"),
    [
        (GeneratorConfig, {"base_chanels": 8}, "unknown key 'base_chanels': did you mean 'base_channels'?"),
        (GeneratorConfig, {"resolution": 100}, "resolution must be a power of two from 8 on, got 100"),
        (GeneratorConfig, {"num_classes": -1}, "num_classes must be 0"),
        (GeneratorConfig, {"attention_resolutions": [7]}, r"map sizes of the network \(8, 16, 32, 64, 128\), got 7"),
        (GeneratorConfig, {"channel_multipliers": [1]}, "channel_multipliers must have 2 to 7 entries at resolution"),
        (GeneratorConfig, {"z_dim": 0}, "z_dim must be at least 1, got 0"),
        (GeneratorConfig, {"backend": "cuda"}, "backend must be one of auto, eager, sdpa, triton, got 'cuda'"),
        (DiscriminatorConfig, {"final_size": 5}, "final_size must be 128 / 2, / 4, ..., got 5"),
        (DiscriminatorConfig, {"channel_multipliers": [1, 2]}, "at least 5 entries to go from 128 to 4, got 2"),
        (DiscriminatorConfig, {"base_channels": 0}, "base_channels must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(cls, values, message):
    with pytest.raises(InputError, match=message):
        from_mapping(cls, values)


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(InputError, match="unknown preset 'oficial-128-feat32'.*did you mean 'official-128-feat32'?"):
        load_preset("oficial-128-feat32")
