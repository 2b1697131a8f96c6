"""DiffAugment against plain loops written from its definition, its gradients, and steps that train under it."""

import copy
import math

import pytest
import torch

import sagan_fast.training.step as step_module
from sagan_fast.choices import DiffAugment, several
from sagan_fast.errors import InputError
from sagan_fast.training.augment import NUMBERS, augment
from sagan_fast.training.config import TrainConfig
from sagan_fast.training.state import new_state
from sagan_fast.training.step import Noise, discriminator_gradient, generator_parts, prepare_batch, train_step

CPU = torch.device("cpu")
ALL = "color,translation,cutout"
SIZES = dict(
    resolution=16,
    generator={"base_channels": 4, "channel_multipliers": [4, 2, 1], "attention_resolutions": [8]},
    discriminator={"base_channels": 4, "channel_multipliers": [1, 2, 2], "attention_resolutions": [8]},
)


def tiny(**overrides):
    options = {"data": "shapes", "batch_size": 4, "diffaugment": ALL, **SIZES, **overrides}
    return TrainConfig.from_preset("shapes-32", out="x", **options)


def batch(generator, size=4):
    images = torch.randint(256, (size, 3, 16, 16), dtype=torch.uint8, generator=generator)
    return images, torch.randint(10, (size,), generator=generator)


def color_by_hand(image, numbers):
    """Brightness in [-0.5, 0.5), saturation in [0, 2), contrast in [0.5, 1.5), one after the other (§4, appendix)."""
    pixels = [[[value + numbers[0] - 0.5 for value in row] for row in channel] for channel in image.tolist()]
    H, W = len(pixels[0]), len(pixels[0][0])
    for i in range(H):
        for j in range(W):
            gray = sum(pixels[c][i][j] for c in range(3)) / 3
            for c in range(3):
                pixels[c][i][j] = gray + (pixels[c][i][j] - gray) * 2 * numbers[1]
    mean = sum(value for channel in pixels for row in channel for value in row) / (3 * H * W)
    rows = [[[mean + (v - mean) * (numbers[2] + 0.5) for v in row] for row in channel] for channel in pixels]
    return torch.tensor(rows, dtype=image.dtype)


def translation_by_hand(image, numbers):
    """Move by whole pixels, up to an eighth of the size, and fill with zeros."""
    _, H, W = image.shape
    most = [int(size / 8 + 0.5) for size in (H, W)]
    down, right = (math.floor(u * (2 * m + 1)) - m for u, m in zip(numbers, most, strict=True))
    moved = torch.zeros_like(image)
    for i in range(H):
        for j in range(W):
            if 0 <= i + down < H and 0 <= j + right < W:
                moved[:, i + down, j + right] = image[:, i, j]
    return moved


def cutout_by_hand(image, numbers):
    """Zeros in a square of half the size, whose centre is anywhere."""
    _, H, W = image.shape
    cut = image.clone()
    (top, h), (left, w) = (
        (math.floor(u * (size + 1 - int(size / 2 + 0.5) % 2)) - int(size / 2 + 0.5) // 2, int(size / 2 + 0.5))
        for u, size in zip(numbers, (H, W), strict=True)
    )
    for i in range(max(top, 0), min(top + h, H)):
        for j in range(max(left, 0), min(left + w, W)):
            cut[:, i, j] = 0
    return cut


BY_HAND = {"color": (color_by_hand, 0, 3), "translation": (translation_by_hand, 3, 5), "cutout": (cutout_by_hand, 5, 7)}


def by_hand(images, policy, numbers):
    found = []
    for image, drawn in zip(images, numbers.tolist(), strict=True):
        for name in several("diffaugment", policy, DiffAugment):
            change, first, last = BY_HAND[name]
            image = change(image, drawn[first:last])
        found.append(image)
    return torch.stack(found)


@pytest.mark.parametrize("policy", ["color", "translation", "cutout", ALL, "cutout, color"])
@pytest.mark.parametrize("size", [(8, 8), (7, 13), (32, 16)])
def test_equals_plain_loops_written_from_the_definition(policy, size, generator):
    images = torch.randn(5, 3, *size, dtype=torch.float64, generator=generator)
    numbers = torch.rand(5, NUMBERS, generator=generator)
    expected = by_hand(images, policy, numbers)
    for given in (images, images.to(memory_format=torch.channels_last)):
        torch.testing.assert_close(augment(given, policy, numbers), expected)
    half = augment(images.bfloat16(), policy, numbers)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, by_hand(images.bfloat16().float(), policy, numbers))


def test_the_amounts_reach_their_ends_and_no_further():
    images = torch.arange(1.0, 1 + 3 * 16 * 16).view(1, 3, 16, 16).expand(3, 3, 16, 16)
    ends = torch.tensor([0.0, 0.5, 1 - 2**-24])[:, None].expand(3, NUMBERS)
    moved = augment(images, "translation", ends)
    assert torch.equal(moved[0, :, :14, :14], images[0, :, 2:, 2:]) and (moved[0, :, 14:] == 0).all()
    assert torch.equal(moved[1], images[1])
    assert torch.equal(moved[2, :, 2:, 2:], images[2, :, :14, :14]) and (moved[2, :, :2] == 0).all()
    cut = (augment(images, "cutout", ends) == 0).all(1).sum((1, 2))
    assert cut.tolist() == [16, 64, 16]  # a corner of the square is left where its centre is a corner of the image
    gray = augment(images, "color", ends)[0]
    torch.testing.assert_close(gray, gray[:1].expand(3, 16, 16))


def test_gradients_pass_twice(generator):
    images = torch.randn(2, 3, 5, 8, dtype=torch.float64, generator=generator).requires_grad_()
    numbers = torch.rand(2, NUMBERS, dtype=torch.float64, generator=generator)
    assert torch.autograd.gradcheck(lambda x: augment(x, ALL, numbers), images)
    assert torch.autograd.gradgradcheck(lambda x: augment(x, ALL, numbers).square(), images)


def test_off_changes_nothing_and_draws_nothing(generator):
    images = torch.randn(2, 3, 8, 8, generator=generator)
    noise, other = Noise(tiny(diffaugment=""), 3, CPU), Noise(tiny(diffaugment=""), 3, CPU)
    assert noise.changes(3) == [None] * 3 and augment(images, "", None) is images
    assert torch.equal(noise.latent(), other.latent())


def test_an_unknown_change_is_a_sentence():
    assert several("diffaugment", "cutout, color", DiffAugment) == ("color", "cutout")
    with pytest.raises(InputError, match="^diffaugment must be any of color,translation,cutout, got 'rotation'$"):
        tiny(diffaugment="color,rotation")


def test_the_discriminator_sees_nothing_but_changed_images(generator, monkeypatch):
    """Real, generated and points between, in both updates, each image with numbers of its own."""
    config = tiny(loss="relativistic", gp_weight=1.0, micro_batch_size=2)
    state, changed, seen = new_state(config, CPU), [], []

    def noted(images, policy, numbers):
        assert policy == ALL and numbers.shape == (2, NUMBERS)
        changed.append((numbers, augment(images, policy, numbers)))
        return changed[-1][1]

    state.discriminator.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    monkeypatch.setattr(step_module, "augment", noted)
    train_step(state, config, *batch(generator), CPU)
    drawn = torch.cat([numbers for numbers, _ in changed])
    assert len(drawn) == 4 * 5 and len(drawn.unique(dim=0)) == len(drawn)  # 3 sets of images for D, 2 for G
    images = torch.cat([found.detach() for _, found in changed])
    for each in torch.cat(seen):
        assert (images == each).flatten(1).all(1).any()


def test_r1_is_the_gradient_at_the_image_before_its_changes(generator, float64):
    config = tiny(r1_gamma=0.7)
    state = new_state(config, CPU)
    state.discriminator.attentions["8"].gamma.data.fill_(0.8)
    network = copy.deepcopy(state.discriminator).eval()
    noise = Noise(config, 0, CPU)
    real, y = prepare_batch(*batch(generator), noise)
    real = real.double()
    values, _ = discriminator_gradient(state, real, y, noise)
    again = Noise(config, 0, CPU)
    again.classes(), again.latent()
    numbers, _ = again.changes(2)
    real.requires_grad_()
    (grad,) = torch.autograd.grad(network(augment(real, ALL, numbers), y).sum(), real)
    torch.testing.assert_close(values["r1"], grad.square().sum((1, 2, 3)).mean(), rtol=1e-4, atol=1e-6)


def test_the_generator_learns_through_the_changes(generator):
    config = tiny()
    state = new_state(config, CPU)
    noise = Noise(config, 0, CPU)
    real, y = prepare_batch(*batch(generator), noise)
    (part,) = generator_parts(state, real, y, noise)
    part.images.square().sum().backward()
    grads = [p.grad for name, p in state.generator.named_parameters() if "attention" not in name]
    assert all(grad is not None and grad.isfinite().all() for grad in grads) and sum(g.abs().sum() for g in grads) > 0
