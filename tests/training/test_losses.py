"""Losses and penalties against straightforward formulas in float64; second derivatives against finite differences."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from sagan_fast.layers import residual_blocks
from sagan_fast.models import discriminator as discriminator_module
from sagan_fast.training.config import TrainConfig
from sagan_fast.training.losses import LOSSES, LeCam, image_gradients, penalty_weights
from sagan_fast.training.precision import Scaler
from sagan_fast.training.state import new_state
from sagan_fast.training.step import (
    Noise,
    discriminator_gradient,
    generator_parts,
    generator_step,
    prepare_batch,
    train_step,
)

CPU = torch.device("cpu")
ALL = dict(r1_gamma=0.7, r2_gamma=0.3, gp_weight=2.0, lecam_weight=0.5)


def tiny(preset="shapes-32", **overrides):
    net = {"base_channels": 4, "attention_resolutions": [8]}
    nets = dict(
        generator={"channel_multipliers": [4, 2, 1], **net}, discriminator={"channel_multipliers": [1, 2, 2], **net}
    )
    options = {"data": "shapes", "batch_size": 4, "resolution": 16, **nets, **overrides}
    return TrainConfig.from_preset(preset, out="x", **options)


def batch(generator, size=4):
    images = torch.randint(256, (size, 3, 16, 16), dtype=torch.uint8, generator=generator)
    return images, torch.randint(10, (size,), generator=generator)


def tiny_state(config, dtype=torch.float32):
    """Return a state whose attention counts and whose generator's images depend on nothing but z."""
    state = new_state(config, CPU)
    for model in (state.generator, state.discriminator):
        model.to(dtype)
        model.attentions["8"].gamma.data.fill_(0.8)
    state.lecam.to(dtype)
    state.generator.eval()
    return state


def gradient_of(config, images, labels, dtype=torch.float32, state=None):
    state = state or tiny_state(config, dtype)
    noise = Noise(config, state.step, CPU)
    real, y = prepare_batch(images, labels, noise)
    values, update = discriminator_gradient(state, real.to(dtype), y, noise)
    return state, values, update


def softplus(x):
    return math.log1p(math.exp(-abs(x))) + max(x, 0.0)


BY_HAND = {
    "hinge": (lambda r, f: max(0, 1 - r) + max(0, 1 + f), lambda r, f: -f),
    "non_saturating": (lambda r, f: softplus(-r) + softplus(f), lambda r, f: softplus(-f)),
    "wasserstein": (lambda r, f: f - r, lambda r, f: -f),
    "relativistic": (lambda r, f: -math.log(1 / (1 + math.exp(-(r - f)))), lambda r, f: softplus(r - f)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_by_hand_and_in_float32_for_half_precision(name, generator):
    real, fake = (2 * torch.randn(9, dtype=torch.float64, generator=generator) for _ in range(2))
    d_hand, g_hand = BY_HAND[name]
    pairs = list(zip(real.tolist(), fake.tolist(), strict=True))
    loss = LOSSES[name]
    assert loss.discriminator(real, fake).item() == pytest.approx(sum(d_hand(*pair) for pair in pairs) / 9)
    assert loss.generator(fake, real).item() == pytest.approx(sum(g_hand(*pair) for pair in pairs) / 9)
    assert loss.undecided == pytest.approx(d_hand(0.0, 0.0))
    logits = torch.full((4096,), 0.1, dtype=torch.bfloat16)
    for function in (loss.discriminator, loss.generator):
        half, exact = function(logits, -logits), function(logits.double(), -logits.double())
        assert half.dtype == torch.float32 and half.item() == pytest.approx(exact.item(), rel=1e-5)


def straightforward(config, network, real, y_real, fake, y_fake, shares, averages):
    """Return the discriminator's loss as a number: image by image, first derivatives alone, all in float64."""

    def slope(x, y):
        x = x[None].detach().requires_grad_()
        (grad,) = torch.autograd.grad(network(x, y[None])[0], x)
        return grad.flatten().norm().item()

    with torch.no_grad():
        scores = network(real, y_real).tolist(), network(fake, y_fake).tolist()
    total = 0.0
    for i, (r, f) in enumerate(zip(*scores, strict=True)):
        total += BY_HAND[config.loss][0](r, f)
        total += config.r1_gamma / 2 * slope(real[i], y_real[i]) ** 2
        total += config.r2_gamma / 2 * slope(fake[i], y_fake[i]) ** 2
        between = (1 - shares[i]) * real[i] + shares[i] * fake[i]
        total += config.gp_weight * (slope(between, y_real[i]) - 1) ** 2
        total += config.lecam_weight * (max(0.0, r - averages[1]) ** 2 + max(0.0, averages[0] - f) ** 2)
    return total / len(real)


@pytest.mark.parametrize(
    "options",
    [
        dict(loss="relativistic", **ALL),
        dict(loss="non_saturating", r1_gamma=3.0, micro_batch_size=2),
        dict(loss="wasserstein", r2_gamma=3.0, gp_weight=10.0, micro_batch_size=1),
    ],
    ids=lambda options: options["loss"],
)
def test_the_gradient_is_that_of_the_formula_by_finite_differences(options, generator, float64, monkeypatch):
    # Smooth, or a difference across a kink of a ReLU would be far from the derivative of a squared gradient.
    smooth = SimpleNamespace(
        relu=lambda x, inplace=False: F.softplus(x), avg_pool2d=F.avg_pool2d, interpolate=F.interpolate
    )
    monkeypatch.setattr(residual_blocks, "F", smooth)
    monkeypatch.setattr(residual_blocks.DiscriminatorBlock, "products", False)  # no ReLU inside a convolution
    monkeypatch.setattr(discriminator_module, "F", smooth)
    config = tiny(**options)
    config.discriminator.__dict__["attention_pool"] = False
    images, labels = batch(generator)
    state = tiny_state(config, float64)
    state.lecam.update(torch.tensor([0.4, -0.2]))
    copied = copy.deepcopy(state.discriminator).eval()  # not fused, u and v stay as they are
    state, values, _ = gradient_of(config, images, labels, float64, state)

    noise = Noise(config, 0, CPU)
    real, y_real = prepare_batch(images, labels, noise)
    y_fake = y_real if config.loss == "relativistic" else noise.classes()
    with torch.no_grad():
        fake = state.generator(noise.latent(), y_fake)
    shares = noise.shares() if config.gp_weight else torch.zeros(4)
    given = real.double(), y_real, fake, y_fake, shares, (0.4, -0.2)
    directions = [torch.randn(p.shape, generator=generator) * p.abs().mean() for p in copied.parameters()]
    slope = sum((p.grad * d).sum() for p, d in zip(state.discriminator.parameters(), directions, strict=True))
    values_there = []
    for h in (1e-5, -1e-5):
        there = copy.deepcopy(copied)
        with torch.no_grad():
            for p, d in zip(there.parameters(), directions, strict=True):
                p.add_(d, alpha=h)
        values_there.append(straightforward(config, there, *given))
    difference = (values_there[0] - values_there[1]) / 2e-5
    assert slope.item() == pytest.approx(difference, rel=1e-5, abs=1e-7)
    wanted = {"r1": config.r1_gamma, "r2": config.r2_gamma, "gradient_penalty": config.gp_weight}
    assert all((name in values) == bool(weight) for name, weight in wanted.items())


@pytest.mark.parametrize("options", [dict(loss="relativistic", **ALL), dict(r1_gamma=1.0), dict(loss="wasserstein")])
def test_micro_batches_add_up_with_every_term(options, generator, float64):
    images, labels = batch(generator)
    found = [gradient_of(tiny(**options, micro_batch_size=micro), images, labels, float64) for micro in (0, 2)]
    (whole, values, _), (added, added_values, _) = found
    for a, b in zip(whole.discriminator.parameters(), added.discriminator.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-9, atol=1e-9 * (1 + a.grad.abs().max().item()))
    for name, value in values.items():
        torch.testing.assert_close(added_values[name], value, rtol=1e-9, atol=1e-9)


def test_lazy_penalties_count_as_often_as_they_are_left_out(generator):
    config = tiny(r1_gamma=0.5, gp_weight=10.0, penalty_every=4)
    assert penalty_weights(config, 8) == {"r1": 1.0, "gradient_penalty": 40.0}
    assert all(penalty_weights(config, step) == {} for step in (1, 2, 3, 5))
    state = new_state(config, CPU)
    has = ["r1" in train_step(state, config, *batch(generator), CPU) for _ in range(5)]
    assert has == [True, False, False, False, True]


def test_penalty_gradients_are_not_scaled_nor_overflow_under_fp16(generator):
    x = torch.randn(2, 3, 4, 4, generator=generator).requires_grad_()
    weight = torch.full((48,), 1e-4, dtype=torch.float16)
    scaler = Scaler("cpu", enabled=True)
    (found,) = image_gradients([x], [x.half().flatten(1) @ weight], scaler)  # half the smallest number squared vanishes
    assert scaler.get_scale() == 65536
    torch.testing.assert_close(found, weight.float().expand(2, 48), rtol=1e-3, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_penalties_under_autocast_are_near_those_in_float32(dtype, generator, monkeypatch):
    tolerance = 0.3  # rounding lets a ReLU change sides, and with it the gradient at an image; a wrong scale is 1024
    images, labels = batch(generator)
    config = tiny(loss="relativistic", r1_gamma=2.0, r2_gamma=2.0, gp_weight=1.0)
    exact, values, _ = gradient_of(config, images, labels)
    state = tiny_state(config)
    monkeypatch.setattr(state.precision, "autocast", lambda: torch.autocast("cpu", dtype=dtype))
    if dtype == torch.float16:
        state.d_scaler = Scaler("cpu", enabled=True)
        state.d_scaler.load_state_dict({**state.d_scaler.state_dict(), "scale": 1024.0})  # found in some steps of a run
    state, half_values, _ = gradient_of(config, images, labels, state=state)
    state.d_scaler.unscale_(state.d_optimizer)
    for name, value in values.items():
        torch.testing.assert_close(half_values[name], value, rtol=tolerance, atol=tolerance)
    a, b = (torch.cat([p.grad.flatten() for p in s.discriminator.parameters()]) for s in (exact, state))
    assert (a - b).norm() / a.norm() < tolerance


def test_lecam_by_hand(generator):
    lecam, real, fake = LeCam(0.9), torch.randn(6, generator=generator), torch.randn(6, generator=generator)
    assert lecam.penalty(real, fake) == 0
    means = torch.randn(5, 2, generator=generator)
    for each in means:
        lecam.update(each)
    lecam.update(torch.tensor([float("inf"), 0.0]))  # overflowed under fp16
    weights = torch.tensor([0.9 ** (4 - i) for i in range(5)])
    a_real, a_fake = (weights[:, None] * means).sum(0) / weights.sum()
    expected = (real - a_fake).clamp_min(0).square().mean() + (a_real - fake).clamp_min(0).square().mean()
    torch.testing.assert_close(lecam.penalty(real, fake), expected)
    resumed = LeCam(0.9)
    resumed.load_state_dict(lecam.state_dict())
    assert torch.equal(resumed.penalty(real, fake), lecam.penalty(real, fake))


def test_the_relativistic_generator_is_compared_with_real_images_of_its_classes(generator):
    config = tiny(loss="relativistic", micro_batch_size=2)
    state = tiny_state(config)
    noise = Noise(config, 0, CPU)
    real, y = prepare_batch(*batch(generator), noise)
    z = Noise(config, 0, CPU).latent()
    with torch.no_grad():
        expected = F.softplus(state.discriminator(real, y) - state.discriminator(state.generator(z, y), y)).mean()
    found = generator_step(state, noise, generator_parts(state, real, y, noise))["g_loss"]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_trains_with_every_penalty(loss, generator):
    config = tiny(loss=loss, penalty_every=2, **ALL)
    state = new_state(config, CPU)
    before = [p.detach().clone() for p in (*state.discriminator.parameters(), *state.generator.parameters())]
    for _ in range(3):
        values = train_step(state, config, *batch(generator), CPU)
        assert all(value.isfinite() for value in values.values())
    assert {"r1", "r2", "gradient_penalty", "lecam"} <= set(values) and state.lecam.weight > 0
    now = [*state.discriminator.parameters(), *state.generator.parameters()]
    assert sum(not torch.equal(a, b) for a, b in zip(before, now, strict=True)) > len(now) - 4


@pytest.mark.parametrize("preset", ["r3-32", "r3-64"])
def test_the_recipes_of_r3gan_train(preset, generator):
    config = tiny(preset)
    assert config.loss == "relativistic" and config.r1_gamma == config.r2_gamma > 0
    values = train_step(new_state(config, CPU), config, *batch(generator), CPU)
    assert all(value.isfinite() for value in values.values()) and {"r1", "r2"} <= set(values)
