"""SAGAN's discriminator (the released discriminator.py): wide residual down-blocks, attention, sum pool, projection."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from sagan_fast.layers.initialization import xavier
from sagan_fast.layers.residual_blocks import DiscriminatorBlock
from sagan_fast.layers.spectral_norm import spectral_norm
from sagan_fast.models.config import DiscriminatorConfig, load_preset, network_config
from sagan_fast.models.generator import attention_block, check_classes, run_block


class Discriminator(nn.Module):
    """D(x, y) returns logits (B,) of images `x` (B, 3, R, R) in [-1, 1] and classes `y` (B,) int64 or None.

    logit = linear(h) + <embedding(y), h> with h the sum over the last map (Miyato and Koyama 2018; Zhang et al. 2019,
    the released discriminator.py). Spectral norm on every layer, no batch norm. `checkpoint_activations` as in
    `Generator`. Raises ValueError for images of another size, and where a conditional discriminator is given no y or
    the reverse.
    """

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpoint_activations = False
        widths, eps = config.widths, config.sn_eps
        self.blocks = nn.ModuleList()
        self.attentions = nn.ModuleDict()
        size_before, channels = config.resolution, 3
        for i, (width, size) in enumerate(zip(widths, config.sizes, strict=True)):
            downsample = size < size_before
            rectified = config.rectified_shortcut
            self.blocks.append(DiscriminatorBlock(channels, width, downsample, i == 0, eps, rectified))
            if downsample and size in config.attention_resolutions:
                self.attentions[str(size)] = attention_block(width, config)
            size_before, channels = size, width
        self.linear = spectral_norm(xavier(nn.Linear(channels, 1)), eps=eps)
        self.embedding = None
        if config.num_classes > 0:
            self.embedding = spectral_norm(xavier(nn.Embedding(config.num_classes, channels)), eps=eps)

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> Discriminator:
        """Return the discriminator of the preset `name`; `overrides` are fields of `DiscriminatorConfig`.

        Raises InputError (a ValueError) for unknown names and fields.
        """
        return cls(network_config(DiscriminatorConfig, load_preset(name), "discriminator", **overrides))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Return logits (B,) for images `x` (B, 3, R, R) and classes `y` (B,)."""
        size = self.config.resolution
        if x.ndim != 4 or x.shape[1:] != (3, size, size):
            raise ValueError(f"Discriminator: x must have shape (B, 3, {size}, {size}), got {tuple(x.shape)}")
        check_classes("Discriminator", y, self.config.num_classes, x)
        size_before = size
        for block, size in zip(self.blocks, self.config.sizes, strict=True):
            x = run_block(self.checkpoint_activations, block, x)
            if size < size_before and str(size) in self.attentions:
                x = run_block(self.checkpoint_activations, self.attentions[str(size)], x)
            size_before = size
        h = F.relu(x).sum(dim=(2, 3))
        logits: Tensor = self.linear(h).squeeze(1)
        if self.embedding is not None:
            logits = logits + (self.embedding(y) * h).sum(dim=1)
        return logits
