"""One step: what moves and what does not, labels drawn uniformly, spectral norm once per update."""

import copy
import re

import pytest
import torch

import sagan_fast.training.step as step_module
from sagan_fast import Generator
from sagan_fast.distributed import World
from sagan_fast.errors import InputError
from sagan_fast.layers.residual_blocks import DiscriminatorBlock, GeneratorBlock
from sagan_fast.training.config import TrainConfig
from sagan_fast.training.state import new_state
from sagan_fast.training.step import (
    LANE,
    Noise,
    discriminator_gradient,
    ema_share,
    generator_parts,
    generator_step,
    prepare_batch,
    statistics_shared,
    train_step,
    update_ema,
)

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
    discriminator_gradient(state, real, y, noise)[1]()
    assert same(g, weights(state.generator)) and same(ug, vectors(state.generator))
    assert not same(d, weights(state.discriminator)) and not same(ud, vectors(state.discriminator))
    d, ud = weights(state.discriminator), vectors(state.discriminator)
    generator_step(state, noise, generator_parts(state, real, y, noise))
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


@pytest.mark.parametrize(("batch_size", "lanes"), [(24, 1), (511, 1), (512, 2), (1536, 4), (4096, 16)])
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_every_process_draws_its_own_samples_of_the_same_batch(batch_size, lanes, size):
    config = small(batch_size=batch_size)
    whole = Noise(config, 3, CPU)
    assert whole.lanes == lanes
    z, y = whole.latent(), whole.classes()
    assert len(z.unique(dim=0)) == batch_size and abs(z.mean()) < 0.05 and abs(z.std() - 1) < 0.05
    if batch_size % size:
        with pytest.raises(InputError, match=f"divisible by the number of processes = {size}, got {batch_size}"):
            Noise(config, 3, CPU, World(CPU, 0, size))
    else:
        for rank in range(size):
            mine = Noise(config, 3, CPU, World(CPU, rank, size))
            assert torch.equal(mine.latent(), z[rank::size]) and torch.equal(mine.classes(), y[rank::size])
            assert len(mine.rngs) * LANE <= max(LANE, 2 * batch_size // size)


def test_a_rollback_draws_other_noise():
    config = small(batch_size=4)
    first, second = (Noise(config, 3, CPU, rollbacks=r).latent() for r in (0, 1))
    assert not torch.equal(first, second)


def test_running_averages_of_micro_batches_move_once_by_their_mean(generator):
    norm = torch.nn.BatchNorm2d(3, momentum=0.3)
    parts = [torch.randn(4, 3, 2, 2, generator=generator) * (i + 1) + i for i in range(3)]
    for part, x in enumerate(parts):
        with statistics_shared(norm, part, 3):
            norm(x)
    assert norm.momentum == 0.3 and norm.num_batches_tracked == 1
    mean = torch.stack([x.mean((0, 2, 3)) for x in parts]).mean(0)
    var = torch.stack([x.var((0, 2, 3)) for x in parts]).mean(0)
    torch.testing.assert_close(norm.running_mean, 0.3 * mean)
    torch.testing.assert_close(norm.running_var, 0.7 + 0.3 * var)


def test_micro_batches_add_up_to_the_gradient_of_the_batch_where_there_is_no_batch_norm(generator, float64):
    images, labels = batch(8, generator)
    grads = []
    for micro in (0, 2):
        config = small(batch_size=8, micro_batch_size=micro)
        state = new_state(config, CPU)
        state.generator.eval()  # batch norm with its running averages
        noise = Noise(config, 0, CPU)
        real, y = prepare_batch(images, labels, noise)
        discriminator_gradient(state, real.double(), y, noise)
        grads.append([p.grad.clone() for p in state.discriminator.parameters()])
    for whole, added in zip(*grads, strict=True):
        torch.testing.assert_close(added, whole, rtol=1e-9, atol=1e-9)


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


def test_parameters_and_statistics_are_averaged_u_and_v_copied():
    model = Generator.from_preset("shapes-32", base_channels=4)
    average = copy.deepcopy(model)
    before = copy.deepcopy(average.state_dict())
    model(torch.randn(4, 128), torch.tensor([0, 1, 2, 3]))  # moves u, v and the running statistics
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
    update_ema(average, model, ema_share(decay=0.75, step=1000))
    now, new = average.state_dict(), model.state_dict()
    for name, value in now.items():
        if name.endswith(("_u", "_v", "num_batches_tracked")):
            assert torch.equal(value, new[name]), name
        else:
            torch.testing.assert_close(value, 0.75 * before[name] + 0.25 * new[name], msg=name)


def test_the_first_steps_forget_the_random_weights():
    model, average = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    model.weight.data.fill_(1.0), average.weight.data.fill_(0.0)
    update_ema(average, model, ema_share(decay=0.9999, step=1))
    torch.testing.assert_close(average.weight.item(), 1 - 2 / 11)


def test_twenty_steps_are_the_same_with_all_options_of_the_blocks_and_with_none(generator, float64, monkeypatch):
    monkeypatch.setattr(step_module, "prepare_batch", lambda *args: (prepare_batch(*args)[0].double(), args[1]))
    images = [batch(4, generator) for _ in range(20)]
    ahead_of_norm = re.compile(r"blocks\.\d+\.(conv1|conv2|shortcut)\.bias")
    for name, value in (("IS_MEASURED", True), ("LEAST_CHANNELS", 1), ("LEAST_PAIRS", 1), ("MANY_PAIRS", 64)):
        monkeypatch.setattr(f"sagan_fast.ops.convolution.{name}", value)
    found = []
    for resizing, in_place in (("plain", False), ("folded", True)):
        config = small(batch_size=4, r1_gamma=0.1, penalty_every=4)
        state = new_state(config, CPU)
        for model in (state.generator, state.discriminator, state.ema):
            model.double()
        state.generator.remakes = in_place
        for module in (*state.generator.modules(), *state.discriminator.modules()):
            if isinstance(module, (GeneratorBlock, DiscriminatorBlock)):
                module.resizing, module.in_place, module.products = resizing, in_place, in_place
                module.remakes, module.keeps_pooled = in_place, not in_place
        values = [train_step(state, config, *some, CPU) for some in images]
        # The gradient of a bias ahead of a batch norm is zero but for rounding, which Adam makes steps of.
        weights = [p for name, p in state.generator.named_parameters() if not ahead_of_norm.match(name)]
        assert len(weights) < len(list(state.generator.parameters()))
        found.append([*values[-1].values(), *weights, *state.discriminator.parameters()])
    assert found[0][0].dtype == torch.float64
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
