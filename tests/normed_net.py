"""A small network of spectral-normed layers of three kinds, and what several tests ask of it."""

import torch
from torch import nn

from sagan_fast.layers.spectral_norm import spectral_norm


def net(norm=spectral_norm):
    return nn.Sequential(
        norm(nn.Conv2d(3, 8, 3)), nn.ReLU(), norm(nn.ConvTranspose2d(8, 4, 2)), nn.Flatten(), norm(nn.Linear(196, 2))
    )


def images(generator, count=2):
    return torch.randn(count, 3, 8, 8, generator=generator)


def state_of(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def is_same(before, model):
    return all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())


def gradients(loss, model):
    return torch.autograd.grad(loss, list(model.parameters()))
