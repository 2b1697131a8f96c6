"""The hinge losses (Lim and Ye 2017; Zhang et al. 2019, eq. 4)."""

import torch.nn.functional as F
from torch import Tensor


def discriminator_hinge(real: Tensor, fake: Tensor) -> Tensor:
    """Return mean(relu(1 - real)) + mean(relu(1 + fake)), a scalar, from logits of shape (B,), in float32."""
    return F.relu(1.0 - real.float()).mean() + F.relu(1.0 + fake.float()).mean()


def generator_hinge(fake: Tensor) -> Tensor:
    """Return -mean(fake), a scalar, from logits (B,), in float32."""
    return -fake.float().mean()
