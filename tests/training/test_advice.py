"""Signs of trouble are told once, and only when they are there."""

import pytest

from sagan_fast.training.advice import PATIENCE, Advice
from sagan_fast.training.config import TrainConfig

HEALTHY = {"d_loss": 1.2, "d_real": 0.8, "d_fake": -0.4, "grad_norm/d": 3.0, "gamma/g.attentions.16": 0.02}


@pytest.mark.parametrize(
    ("change", "step", "words"),
    [
        ({"d_loss": 0.1}, 100, "the discriminator is winning"),
        ({"d_fake": 0.8}, 2000, "nearly the same score"),
        ({"gamma/g.attentions.16": -0.0005}, 20_000, "attention is not used yet"),
        ({"grad_norm/g": 2000.0}, 100, "a gradient norm is above 1000"),
    ],
)
def test_a_sign_is_told_once_when_it_stays(change, step, words):
    advice = Advice(TrainConfig.from_preset("shapes-32", out="x"))
    lines = [advice.read(step + i, {**HEALTHY, **change}) for i in range(3 * PATIENCE)]
    (told,) = lines[PATIENCE - 1]
    assert words in told and f"note at step {step + PATIENCE - 1}: " in told and "(docs/training.md)" in told
    assert not any(lines[: PATIENCE - 1] + lines[PATIENCE:])


def test_a_healthy_run_and_single_lines_are_not_commented():
    advice = Advice(TrainConfig.from_preset("shapes-32", out="x"))
    for step in range(1, 60):
        assert advice.read(1000 * step, {**HEALTHY, "d_loss": 0.1 if step % PATIENCE == 0 else 1.0}) == []


def test_a_loss_without_an_end_is_not_won():
    advice = Advice(TrainConfig.from_preset("shapes-32", out="x", loss="wasserstein"))
    assert not any(advice.read(step, {**HEALTHY, "d_loss": -3.0}) for step in range(9))
