import math

import pytest
import torch

from sagan_fast.errors import Diverged
from sagan_fast.training.config import TrainConfig
from sagan_fast.training.health import Guard, memory_gib, network_values
from sagan_fast.training.state import new_state

FINE = {"d_loss": 1.2, "g_loss": 0.3, "d_real": 0.4, "d_fake": -0.5, "grad_norm/d": 3.0, "grad_norm/g": 0.0}


@pytest.mark.parametrize("name", FINE)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_stops_at_once(name, value):
    with pytest.raises(Diverged, match=f"{name} is {value} at step 7"):
        Guard(patience=5).check(7, {**FINE, name: value})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"d_loss": 0.0, "d_real": 9.0, "d_fake": -9.0, "g_loss": 9.0}, "won outright by step 2"),
        ({"d_loss": 2.0, "d_real": 0.3, "d_fake": 0.3, "g_loss": -0.3}, "died by step 2: it gave real and fake"),
    ],
)
def test_a_collapsed_discriminator_stops_after_patience_and_a_good_line_starts_anew(values, message):
    guard = Guard(patience=3)
    for line in (values, values, FINE, values, values):
        guard.check(0, line)
    with pytest.raises(Diverged, match=message):
        guard.check(2, values)


def test_what_counts_as_a_collapse_depends_on_the_loss():
    below, same = {**FINE, "d_loss": -3.0}, {**FINE, "d_real": 0.3, "d_fake": 0.3}
    critic, paired = Guard(patience=1, loss="wasserstein"), Guard(patience=1, loss="relativistic")
    critic.check(0, below)  # a Wasserstein distance of 3
    paired.check(0, {**same, "d_loss": 2.0})
    with pytest.raises(Diverged, match="won outright"):
        paired.check(1, {**FINE, "d_loss": 1e-4})
    with pytest.raises(Diverged, match="died by step 1"):
        Guard(patience=1, loss="relativistic").check(1, {**same, "d_loss": math.log(2)})
    with pytest.raises(Diverged, match="r1 is inf at step 3"):
        critic.check(3, {**FINE, "r1": float("inf")})


def test_a_sigma_that_grows_too_fast_stops_and_a_slow_one_does_not():
    guard = Guard(patience=4, growth=10.0)
    for step in range(40):
        guard.check(step, {**FINE, "sigma_max/g": 1.5**step, "sigma_max/d": 2.0})
    with pytest.raises(Diverged, match=r"sigma_max/d grew from 2 to 20.1 in 4 log lines by step 40"):
        guard.check(40, {**FINE, "sigma_max/g": 1.5**40, "sigma_max/d": 20.1})
    with pytest.raises(Diverged, match="sigma_max/g"):
        Guard(patience=4).check(1, {**FINE, "sigma_max/g": float("nan")})


def test_a_divergence_says_how_long_all_was_well():
    guard = Guard(patience=2)
    won = {**FINE, "d_loss": 0.0}
    for step, line in ((1, FINE), (2, won), (3, FINE), (4, won)):
        guard.check(step, line)
    resumed = Guard(patience=2)
    resumed.load_state_dict(guard.state_dict())
    for each in (guard, resumed):
        with pytest.raises(Diverged) as error:
            each.check(5, won)
        assert error.value.healthy_until == 3
    resumed.load_state_dict({})
    resumed.check(6, won)


def tiny_state():
    narrow = {"base_channels": 2}
    config = TrainConfig.from_preset("shapes-32", out="x", generator=narrow, discriminator=narrow)
    return new_state(config, torch.device("cpu"))


def test_the_log_shows_gammas_sigmas_and_skipped_steps():
    state = tiny_state()
    state.generator.attentions["16"].gamma.data.fill_(0.25)
    values, curves = network_values(state)
    assert values["gamma/g.attentions.16"] == 0.25 and values["gamma/d.attentions.16"] == 0.0
    assert values["skipped_steps/g"] == values["skipped_steps/d"] == 0
    assert values["sigma_max/d"] == max(v for k, v in curves.items() if k.startswith("sigma/d."))
    assert len(curves) == len(state.g_spectral) + len(state.d_spectral)


@pytest.mark.parametrize("place", [0, 1, -1])
def test_the_largest_sigma_is_nan_wherever_one_is(place):
    state = tiny_state()
    found = dict.fromkeys(state.d_spectral.sigmas(), 1.0)
    found[list(found)[place]] = float("nan")
    state.d_spectral.sigmas = lambda: found
    values, _ = network_values(state)
    assert math.isnan(values["sigma_max/d"]) and math.isfinite(values["sigma_max/g"])
    with pytest.raises(Diverged, match="sigma_max/d grew from nan to nan"):
        Guard(patience=3).check(1, {**FINE, **values})


def test_memory_is_that_of_this_process():
    assert 0.05 < memory_gib(torch.device("cpu")) < 100


@pytest.mark.gpu
def test_memory_is_that_of_the_device():
    before = memory_gib(torch.device("cuda"))
    torch.ones(2**28, device="cuda")
    assert memory_gib(torch.device("cuda")) >= max(before, 1.0)
