"""One step: what moves and what does not, labels drawn uniformly, spectral norm once per update."""

import copy

import pytest
import torch

from sagan_fast.training.config import TrainConfig
from sagan_fast.training.state import new_state
from sagan_fast.training.step import Noise, discriminator_step, generator_step, prepare_batch, train_step

CPU = torch.device("cpu")


def small(**overrides):
    narrow = {"base_channels": 4}
    return TrainConfig.from_preset("shapes-32", out="x", generator=narrow, discriminator=narrow, **overrides)


def batch(size, generator):
    images = torch.randint(256, (size, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return images, torch.randint(10, (size,), generator=generator)


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def vectors(model):
    return {name: b.clone() for name, b in model.named_buffers() if name.endswith(("_u", "_v"))}


def same(before, after):
    return all(torch.equal(before[name], after[name]) for name in before)


def test_each_step_updates_its_own_network(generator):
    config = small(batch_size=4)
    state = new_state(config, CPU)
    noise = Noise(config, 0, CPU)
    real, y = prepare_batch(*batch(4, generator), noise)
    g, d, ud, ug = (
        weights(state.generator),
        weights(state.discriminator),
        vectors(state.discriminator),
        vectors(state.generator),
    )
    discriminator_step(state, real, y, noise)
    assert same(g, weights(state.generator)) and same(ug, vectors(state.generator))
    assert not same(d, weights(state.discriminator)) and not same(ud, vectors(state.discriminator))
    d, ud = weights(state.discriminator), vectors(state.discriminator)
    generator_step(state, noise)
    assert same(d, weights(state.discriminator)) and same(ud, vectors(state.discriminator))
    assert not same(g, weights(state.generator)) and not same(ug, vectors(state.generator))
    assert all(p.requires_grad for p in state.discriminator.parameters())
    assert all(p.grad is None for p in state.ema.parameters())


def test_values_are_the_losses_of_the_scores(generator):
    config = small(batch_size=4)
    state = new_state(config, CPU)
    before = copy.deepcopy(state.discriminator)
    images, labels = batch(4, generator)
    noise = Noise(config, 0, CPU)
    real, y = prepare_batch(images, labels, noise)
    values = train_step(state, config, images, labels, CPU)
    assert set(values) == {"d_loss", "g_loss", "d_real", "d_fake", "grad_norm/d", "grad_norm/g"} and state.step == 1
    torch.testing.assert_close(values["d_real"], before.eval()(real, y).mean(), rtol=1e-4, atol=1e-5)


def test_labels_are_drawn_uniformly_whatever_the_batch():
    config = small(batch_size=5000)
    counts = torch.bincount(Noise(config, 3, CPU).classes(), minlength=10)
    assert counts.min() > 400 and counts.max() < 600


def test_noise_depends_on_seed_and_step_alone():
    def draw(seed, step):
        torch.manual_seed(seed * 7 + step)  # must not matter
        noise = Noise(small(seed=seed), step, CPU)
        return noise.latent()

    assert torch.equal(draw(0, 5), draw(0, 5))
    assert not torch.equal(draw(0, 5), draw(0, 6)) and not torch.equal(draw(0, 5), draw(1, 5))


@pytest.mark.parametrize("flip", [False, True])
def test_pixels_become_floats_in_range_and_flips_are_the_runs(flip, generator):
    config = small(batch_size=64, flip=flip)
    images, labels = batch(64, generator)
    pixels, _ = prepare_batch(images, labels, Noise(config, 0, CPU))
    expected = images.float() / 127.5 - 1
    mirrored = [torch.allclose(p, e.flip(2), atol=1e-6) for p, e in zip(pixels, expected, strict=True)]
    kept = [torch.allclose(p, e, atol=1e-6) for p, e in zip(pixels, expected, strict=True)]
    assert all(a or b for a, b in zip(mirrored, kept, strict=True))
    assert 10 < sum(mirrored) < 54 if flip else all(kept)


def test_unconditional_step(generator):
    config = small(num_classes=0, batch_size=4)
    state = new_state(config, CPU)
    train_step(state, config, *batch(4, generator), CPU)
    assert state.step == 1
