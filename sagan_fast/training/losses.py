"""Adversarial losses, and what regularises the discriminator: R1, R2, WGAN-GP's gradient penalty, LeCam.

Scores are logits D(x) of shape (B,). Everything is computed in float32, or float64 for float64 scores.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sagan_fast.choices import Loss
from sagan_fast.kernels.launch import accumulator_dtype
from sagan_fast.training.config import TrainConfig
from sagan_fast.training.precision import Scaler


class AdversarialLoss(NamedTuple):
    """`discriminator(real, fake)` and `generator(fake, real)` return scalars from scores (B,).

    `is_paired`: each real image is compared with a fake one of its class, also in the generator's loss. `is_won_at_0`:
    a loss of the discriminator near 0 means that the generator gets no gradient.
    """

    discriminator: Callable[[Tensor, Tensor], Tensor]
    generator: Callable[[Tensor, Tensor], Tensor]
    is_paired: bool = False
    is_won_at_0: bool = True

    @property
    def undecided(self) -> float:
        """The discriminator's loss where all scores are 0."""
        return self.discriminator(torch.zeros(1), torch.zeros(1)).item()


def discriminator_hinge(real: Tensor, fake: Tensor) -> Tensor:
    """Return mean(relu(1 - real)) + mean(relu(1 + fake)). Source: Lim and Ye 2017; Zhang et al. 2019, eq. 4."""
    return F.relu(1.0 - exact(real)).mean() + F.relu(1.0 + exact(fake)).mean()


def generator_hinge(fake: Tensor, real: Tensor | None = None) -> Tensor:
    """Return -mean(fake), the generator's loss for the hinge and for Wasserstein; `real` is not used."""
    return -exact(fake).mean()


def discriminator_non_saturating(real: Tensor, fake: Tensor) -> Tensor:
    """Return mean(softplus(-real)) + mean(softplus(fake)). Source: Goodfellow et al. 2014."""
    return F.softplus(-exact(real)).mean() + F.softplus(exact(fake)).mean()


def generator_non_saturating(fake: Tensor, real: Tensor | None = None) -> Tensor:
    """Return mean(softplus(-fake)); `real` is not used. Source: Goodfellow et al. 2014, §3."""
    return F.softplus(-exact(fake)).mean()


def discriminator_wasserstein(real: Tensor, fake: Tensor) -> Tensor:
    """Return mean(fake) - mean(real). Source: Arjovsky et al. 2017, https://arxiv.org/abs/1701.07875."""
    return exact(fake).mean() - exact(real).mean()


def discriminator_relativistic(real: Tensor, fake: Tensor) -> Tensor:
    """Return mean(softplus(-(real - fake))): each real score is compared with the fake one in its place.

    Source: relativistic pairing GAN (Jolicoeur-Martineau 2019) as in R3GAN (Huang et al. 2024,
    https://arxiv.org/abs/2501.05441, eq. 2), with f(t) = -softplus(-t).
    """
    return F.softplus(exact(fake) - exact(real)).mean()


def generator_relativistic(fake: Tensor, real: Tensor) -> Tensor:
    """Return mean(softplus(-(fake - real))), the discriminator's loss with the roles exchanged."""
    return discriminator_relativistic(fake, real)


LOSSES: Mapping[Loss, AdversarialLoss] = {
    "hinge": AdversarialLoss(discriminator_hinge, generator_hinge),
    "non_saturating": AdversarialLoss(discriminator_non_saturating, generator_non_saturating),
    "wasserstein": AdversarialLoss(discriminator_wasserstein, generator_hinge, is_won_at_0=False),
    "relativistic": AdversarialLoss(discriminator_relativistic, generator_relativistic, is_paired=True),
}


def penalty_weights(config: TrainConfig, step: int) -> dict[str, float]:
    """Return the weights of the gradient penalties of `step` in the discriminator's loss, without those that are 0.

    "r1" and "r2" have gamma/2, "gradient_penalty" its weight. Every `penalty_every` steps, from step 0 on, they count
    `penalty_every` times, and between not at all (lazy regularisation, StyleGAN2, https://arxiv.org/abs/1912.04958,
    appendix B). They share the optimizer's step with the loss, so Adam's settings stay as they are.
    """
    if step % config.penalty_every:
        return {}
    weights = {"r1": config.r1_gamma / 2, "r2": config.r2_gamma / 2, "gradient_penalty": config.gp_weight}
    return {name: weight * config.penalty_every for name, weight in weights.items() if weight}


def image_gradients(images: Sequence[Tensor], scores: Sequence[Tensor], scaler: Scaler) -> list[Tensor]:
    """Return dD(x)/dx of each image, flat (B, 3*R*R), with a graph, for batches of `images` and their `scores` (B,).

    No image may influence the score of another. Under fp16 the backward pass is scaled as that of the loss, so that
    small gradients do not vanish; the results are not scaled.
    """
    found = torch.autograd.grad(
        scaler.scale(torch.stack([exact(each).mean() for each in scores]).sum()), list(images), create_graph=True
    )
    scale = scaler.scale(torch.ones((), device=scores[0].device))
    # Of the mean, not of the sum: the scale times a gradient of 1 would overflow in fp16.
    return [exact(grad).flatten(1) * (len(each) / scale) for grad, each in zip(found, scores, strict=True)]


def zero_centred_penalty(gradients: Tensor) -> Tensor:
    """Return the mean over images of |dD(x)/dx|^2, from (B, 3*R*R): R1 at real images, R2 at fake ones.

    Source: Mescheder et al. 2018, https://arxiv.org/abs/1801.04406, eq. 9 and 10, which weight it with gamma/2.
    """
    return gradients.square().sum(1).mean()


def one_centred_penalty(gradients: Tensor) -> Tensor:
    """Return the mean over images of (|dD(x)/dx| - 1)^2, from (B, 3*R*R).

    Source: WGAN-GP (Gulrajani et al. 2017, https://arxiv.org/abs/1704.00028, eq. 3), whose weight is 10.
    """
    return (torch.linalg.vector_norm(gradients, dim=1) - 1.0).square().mean()


PENALTIES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "r1": zero_centred_penalty,
    "r2": zero_centred_penalty,
    "gradient_penalty": one_centred_penalty,
}


class LeCam(nn.Module):
    """Moving averages of the discriminator's mean scores, and the regularisation that draws its scores to them.

    Source: Tseng et al. 2021, https://arxiv.org/abs/2104.03310, with the one-sided squares and the averages corrected
    for their start of the authors' code (google/lecam-gan).
    """

    sums: Tensor
    weight: Tensor

    def __init__(self, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("sums", torch.zeros(2))
        self.register_buffer("weight", torch.zeros(()))

    def penalty(self, real: Tensor, fake: Tensor) -> Tensor:
        """Return mean(relu(real - a_fake)^2) + mean(relu(a_real - fake)^2), 0 before the first `update`.

        a_real and a_fake are the averages of the mean scores of real and fake images in the steps before this one.
        """
        a_real, a_fake = self.sums / self.weight.clamp_min(torch.finfo(self.weight.dtype).tiny)
        squares = F.relu(exact(real) - a_fake).square().mean() + F.relu(a_real - exact(fake)).square().mean()
        return squares * (self.weight > 0)

    @torch.no_grad()
    def update(self, means: Tensor) -> None:
        """Move the averages towards `means` (2,), the mean scores of all real and all fake images of a step.

        Means that overflowed under fp16 are left out.
        """
        rate = (1.0 - self.decay) * means.isfinite().all()
        self.sums.lerp_(means.nan_to_num().to(self.sums.dtype), rate.to(self.sums.dtype))
        self.weight.lerp_(torch.ones_like(self.weight), rate.to(self.weight.dtype))


def exact(x: Tensor) -> Tensor:
    """Return `x` in the dtype that losses are computed in: float64 for itself, float32 for all others."""
    return x.to(accumulator_dtype(x.dtype))
