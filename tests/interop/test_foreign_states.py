"""What is exported for BigGAN-PyTorch and StudioGAN loads there strictly and gives our samples."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from foreign_networks import CLASSES, WIDTHS_G, Generator, Z

from sagan_fast import Generator as OurGenerator
from sagan_fast.errors import InputError
from sagan_fast.interop import import_generator
from sagan_fast.interop.foreign_states import FORMATS, foreign_state
from sagan_fast.models.config import GeneratorConfig
from shared_by_tests import randn

CONFIG = GeneratorConfig(
    resolution=32, num_classes=CLASSES, base_channels=8, channel_multipliers=tuple(w // 8 for w in WIDTHS_G), z_dim=Z,
    attention_resolutions=(8,),
)  # fmt: skip


def made(**changes):
    ours = OurGenerator(dataclasses.replace(CONFIG, **changes))
    for name, tensor in ours.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2)
        elif "gain" in name or "bias" in name or "running_mean" in name or "gamma" in name:
            tensor.add_(torch.randn_like(tensor) * 0.3)
    return ours.eval().requires_grad_(False)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("gains", ["trained", "as they start"])
def test_it_loads_there_and_gives_our_samples(layout, gains, generator):
    ours, theirs = made(), Generator(layout)
    if gains != "trained":
        ours.blocks[0].norm1.gain.weight.data.fill_(1.0)
    theirs.load_state_dict(foreign_state(ours, layout))
    z, y = randn(4, Z, generator=generator, dtype=torch.float32), torch.arange(4)
    with torch.no_grad():
        expected = ours(z, y)
        assert float((theirs.eval()(z, y) - expected).abs().max()) < 2e-5  # float32, twice rounded
    again = import_generator(foreign_state(ours, layout))
    assert float((again(z, y) - expected).abs().max()) < 2e-5
    assert again.config.widths == CONFIG.widths


def test_without_classes_in_studiogan(generator):
    ours = made(num_classes=0)
    again = import_generator(foreign_state(ours, "studiogan"))
    z = randn(3, Z, generator=generator, dtype=torch.float32)
    assert again.config.num_classes == 0 and float((again(z) - ours(z)).abs().max()) < 2e-5
    assert F.relu(ours(z)).shape == (3, 3, 32, 32)


def test_what_a_layout_cannot_hold_is_refused():
    for changes in ({"attention_pool": False}, {"attention_bias": True}):
        with pytest.raises(InputError, match="holds pooled attention"):
            foreign_state(made(**changes), "biggan-pytorch")
    with pytest.raises(InputError, match="holds generators with classes alone"):
        foreign_state(made(num_classes=0), "biggan-pytorch")
    with pytest.raises(InputError, match="layout must be one of biggan-pytorch, studiogan, got 'voletiv'"):
        foreign_state(made(), "voletiv")
    ours = made()
    ours.norm.running_var.fill_(1e-6)
    with pytest.raises(InputError, match="those of norm are too small"):
        foreign_state(ours, "studiogan")
