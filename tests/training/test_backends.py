"""Training does not depend on what runs the attention."""

import pytest
import torch

from sagan_fast.layers.self_attention import SelfAttention2d
from sagan_fast.training.config import TrainConfig
from sagan_fast.training.state import new_state
from sagan_fast.training.step import train_step

CPU = torch.device("cpu")


def losses(backend, steps):
    """Train a small SAGAN with an attention block in either network; gammas start away from 0."""
    config = TrainConfig.from_preset(
        "shapes-32", out="x", resolution=16, batch_size=2, backend=backend, g_lr=1e-4, d_lr=4e-4,
        generator={"base_channels": 8, "channel_multipliers": [4, 2, 1], "attention_resolutions": [8]},
        discriminator={"base_channels": 8, "channel_multipliers": [1, 2, 4], "attention_resolutions": [4]},
    )  # fmt: skip
    state = new_state(config, CPU)
    with torch.no_grad():
        for module in [*state.generator.modules(), *state.discriminator.modules()]:
            if isinstance(module, SelfAttention2d):
                module.gamma.fill_(0.5)
    rng = torch.Generator().manual_seed(0)
    found = []
    for _ in range(steps):
        images = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8, generator=rng)
        values = train_step(state, config, images, torch.randint(10, (2,), generator=rng), CPU)
        found.append([values["d_loss"].item(), values["g_loss"].item()])
    return torch.tensor(found)


@pytest.mark.parametrize("backend", ["sdpa", "triton"])
@pytest.mark.parametrize("steps", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_the_backend_changes_training_by_no_more_than_fp32_noise(backend, steps):
    """Each step's losses depend on every update before it. (Weights as such differ more: Adam makes whole steps of
    the rounding errors that are all the gradient of a bias ahead of a batch norm.)"""
    torch.testing.assert_close(losses(backend, steps), losses("eager", steps), rtol=1e-5, atol=1e-5)
