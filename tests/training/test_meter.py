import time
from types import SimpleNamespace

import pytest
import torch

from sagan_fast.distributed import World
from sagan_fast.training.config import TrainConfig
from sagan_fast.training.meter import Meter
from sagan_fast.training.state import new_state

NARROW = {"base_channels": 4}
NAMES = ("d_loss", "g_loss", "d_real", "d_fake", "grad_norm/d", "grad_norm/g")


def test_a_line_holds_means_rates_and_the_state_of_the_networks():
    config = TrainConfig.from_preset("shapes-32", out="x", generator=NARROW, discriminator=NARROW, batch_size=8)
    device = torch.device("cpu")
    state, meter = new_state(config, device), Meter(config, World(device))
    for factor in (1.0, 3.0):
        with meter.waiting():
            time.sleep(0.05)
        meter.add({name: torch.tensor(factor * i) for i, name in enumerate(NAMES)})
    time.sleep(0.1)
    values, curves = meter.read(state, SimpleNamespace(num_broken=2))
    assert [values[name] for name in NAMES] == [2.0 * i for i in range(len(NAMES))]
    assert 0.2 < values["loader_wait"] < 0.7 and 16 / 2 < values["images_per_s"] < 16 / 0.2
    assert values["broken_images"] == 2 and values["rollbacks"] == 0 and values["memory_gib"] > 0
    assert values["sigma_max/g"] == pytest.approx(max(v for k, v in curves.items() if k.startswith("sigma/g.")))
    assert meter.steps == 0
    meter.restart()
    meter.add({name: torch.tensor(5.0) for name in NAMES})
    meter.add({"r1": torch.tensor(3.0), **{name: torch.tensor(7.0) for name in NAMES}})
    values, _ = meter.read(state, SimpleNamespace(num_broken=0))
    assert values["d_loss"] == 6.0 and values["r1"] == 3.0  # a penalty every second step is a mean over its own steps
    meter.add({name: torch.tensor(5.0) for name in NAMES})
    assert "r1" not in meter.read(state, SimpleNamespace(num_broken=0))[0]
