"""Samples a trained generator: the same seed gives the same samples for any batch size."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from sagan_fast.errors import InputError
from sagan_fast.models.generator import Generator


def latents(count: int, z_dim: int, seed: int, truncation: float | None = None) -> Tensor:
    """Return z (count, z_dim), normal; with `truncation` T, normal within [-T, T] (values outside are never drawn).

    Raises InputError unless T is positive.
    """
    if truncation is not None and not truncation > 0:
        raise InputError(f"truncation must be positive, got {truncation}")
    rng = torch.Generator().manual_seed(seed)
    z = torch.zeros(count, z_dim)
    if truncation is None:
        return z.normal_(generator=rng)
    return nn.init.trunc_normal_(z, 0.0, 1.0, -truncation, truncation, generator=rng)


def classes(count: int, num_classes: int, class_id: int | None = None) -> Tensor | None:
    """Return y (count,) int64 in order of class: all `class_id`, or an even share of each class.

    None for an unconditional model. Raises InputError for a class there is not.
    """
    if num_classes == 0:
        if class_id is not None:
            raise InputError(f"class-id cannot be given to a model trained without classes, got {class_id}")
        return None
    if class_id is None:
        return torch.arange(count) * num_classes // max(count, num_classes)
    if not 0 <= class_id < num_classes:
        raise InputError(f"class-id must be 0 to {num_classes - 1}, got {class_id}")
    return torch.full((count,), class_id)


def class_name(names: Sequence[str], class_id: int) -> str:
    """Return the name of a class, "class 7" where `names` does not know it."""
    return names[class_id] if class_id < len(names) else f"class {class_id}"


@torch.no_grad()
def sample(generator: Generator, z: Tensor, y: Tensor | None, batch_size: int = 64) -> Iterator[Tensor]:
    """Yield the images (b, 3, R, R) in [-1, 1] of `z` (count, z_dim) and `y` (count,), on the CPU.

    The generator's mode is left as it is: eval (running batch statistics, u and v at rest) is the caller's choice.
    """
    device = next(generator.parameters()).device
    for i in range(0, len(z), batch_size):
        labels = None if y is None else y[i : i + batch_size].to(device)
        yield generator(z[i : i + batch_size].to(device), labels).float().cpu()
