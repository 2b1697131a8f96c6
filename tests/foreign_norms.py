"""Conditional batch norms as other code bases have them, and some that are none, written from their description."""

import torch
import torch.nn.functional as F
from foreign_layers import BigGANLinear, Wrapped
from foreign_networks import CLASSES, BigGANNorm, MmgenNorm, StudioNorm, VoletivNorm
from torch import nn

C, WIDTH = 6, 4


class BigGANShared(nn.Module):
    """BigGAN-PyTorch's with shared embeddings: eps an attribute, the momentum in use a number, whatever is kept."""

    def __init__(self, layer=BigGANLinear, eps=2e-4, momentum=0.3):
        super().__init__()
        self.gain, self.bias = layer(WIDTH, C), layer(WIDTH, C)
        self.eps, self.momentum = eps, momentum
        self.register_buffer("stored_mean", torch.zeros(C))
        self.register_buffer("stored_var", torch.ones(C))

    def normalised(self, x):
        return F.batch_norm(x, self.stored_mean, self.stored_var, None, None, self.training, 0.1, self.eps)

    def forward(self, x, y):
        gain = (1 + self.gain(y)).view(y.size(0), -1, 1, 1)
        return self.normalised(x) * gain + self.bias(y).view(y.size(0), -1, 1, 1)


class MovesByAttribute(BigGANShared):
    def normalised(self, x):
        return F.batch_norm(x, self.stored_mean, self.stored_var, None, None, self.training, self.momentum)


class WithReLU(VoletivNorm):
    """Biases first, and the ReLU inside."""

    def forward(self, x, labels):
        bias, gain = self.embed(labels)[:, :, None, None].chunk(2, 1)
        return F.relu(gain * self.bn(x) + bias)


NORMS = {
    "biggan": lambda: BigGANNorm(C),
    "biggan-shared": BigGANShared,
    "by attribute": lambda: MovesByAttribute(nn.Linear),
    "wrapper": lambda: BigGANShared(lambda i, o: Wrapped(nn.Linear(i, o))),
    "studiogan": lambda: StudioNorm(C),
    "studiogan-embeddings": lambda: StudioNorm(C, linear=False),
    "voletiv": lambda: VoletivNorm(C),
    "mmgeneration": lambda: MmgenNorm(C),
    "with relu": lambda: WithReLU(C),
}


class Instance(BigGANShared):
    """The same as batch norm in evaluation, not in training."""

    def normalised(self, x):
        return F.instance_norm(x, self.stored_mean, self.stored_var, None, None, self.training, 0.1, self.eps)


class Biased(BigGANShared):
    """The running variance is that of the batch, not its unbiased one, as of BigGAN-PyTorch's hand-written layer."""

    def normalised(self, x):
        mean, var = self.stored_mean, self.stored_var
        if self.training:
            var, mean = torch.var_mean(x, (0, 2, 3), unbiased=False)
            self.stored_mean.lerp_(mean.detach(), 0.1)
            self.stored_var.lerp_(var.detach(), 0.1)
        return (x - mean[:, None, None]) / (var + self.eps).sqrt()[:, None, None]


class Squared(VoletivNorm):
    def forward(self, x, y):
        return super().forward(x, y).square()


class Random(VoletivNorm):
    def forward(self, x, y):
        return super().forward(x, y) + torch.randn_like(x)


class Detached(VoletivNorm):
    def forward(self, x, y):
        return super().forward(x, y) + self.embed(y).sum() - self.embed(y).sum().detach()


class Pair(VoletivNorm):
    def forward(self, x, y):
        return super().forward(x, y), y


class Third(VoletivNorm):
    def forward(self, x, y, z):
        return super().forward(x, y)


def with_norm(norm):
    found = VoletivNorm(C)
    found.bn = norm
    return found


def hooked():
    found = VoletivNorm(C)
    found.bn.register_forward_hook(lambda *_: None)
    return found


DEVIATING = {
    "differ by": lambda: Instance(nn.Linear),
    "in training": lambda: Biased(nn.Linear),
    "the nearest form is": lambda: Squared(C),
    "its output is random": lambda: Random(C),
    "gradient or running averages": lambda: Detached(C),
    "returns more than a map": lambda: Pair(C),
    "does not run on a map of 6 x 10 (TypeError": lambda: Third(C),
    "that of the class SyncBatchNorm": lambda: with_norm(nn.SyncBatchNorm(C, affine=False)),
    "has a gain and a bias of its own": lambda: with_norm(nn.BatchNorm2d(C)),
    "bn has hooks": hooked,
}


def condition(norm, generator, images=4, dtype=torch.float64):
    """Return what `norm` takes beside a map of `images`: classes, or the output of a layer before it."""
    if any(isinstance(child, nn.Embedding) for child in norm.children()):
        return torch.randint(CLASSES, (images,), generator=generator)
    width = CLASSES if isinstance(norm, StudioNorm) else WIDTH
    return torch.randn(images, width, generator=generator, dtype=torch.float64).to(dtype)
