"""Updates the averaged generator, which is sampled and evaluated."""

import torch
from torch import Tensor, nn


@torch.no_grad()
def update_ema(average: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """Move the parameters of `average` a share 1 - d towards those of `model`, d = min(decay, (1 + step)/(10 + step)).

    Batch norm's running averages move with them. Everything else that is not a parameter is copied, spectral norm's u
    and v above all: an average of unit vectors is shorter than one, and sigma would come out too small.
    """
    decay = min(decay, (1 + step) / (10 + step))
    averages: list[Tensor] = list(average.parameters())
    values = [p.detach() for p in model.parameters()]
    buffers = dict(model.named_buffers())
    for name, buffer in average.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            averages.append(buffer)
            values.append(buffers[name])
        else:
            buffer.copy_(buffers[name])
    torch._foreach_lerp_(averages, values, 1 - decay)
