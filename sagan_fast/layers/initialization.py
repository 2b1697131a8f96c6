"""The one initialisation of SAGAN: Xavier-uniform weights, zero biases (the released code, ops.py)."""

from typing import TypeVar

from torch import nn

Layer = TypeVar("Layer", nn.Linear, nn.Conv2d, nn.Embedding)


def xavier(layer: Layer) -> Layer:
    """Return `layer` with its weight drawn Xavier-uniform and its bias, if any, set to zero."""
    nn.init.xavier_uniform_(layer.weight)
    bias = getattr(layer, "bias", None)
    if bias is not None:
        nn.init.zeros_(bias)
    return layer
