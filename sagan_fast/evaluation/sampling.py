"""Samples a trained generator: the same seed gives the same samples for any batch size.

Rows of samples show one change: of z, of the class, or of the truncation.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sagan_fast.errors import InputError
from sagan_fast.models.generator import Generator
from sagan_fast.words import list_some, nearest

Rows = tuple[Tensor, Tensor | None, list[str]]
"""z (rows * columns, z_dim), classes or weights of classes likewise, and a label for each row."""


def latents(count: int, z_dim: int, seed: int, truncation: float | None = None) -> Tensor:
    """Return z (count, z_dim), normal; with `truncation` T, normal within [-T, T] (values outside are never drawn).

    Without `truncation`, a larger `count` starts with the same z. Raises InputError unless T is positive.
    """
    if truncation is not None and not truncation > 0:
        raise InputError(f"truncation must be positive, got {truncation}")
    rng = torch.Generator().manual_seed(seed)
    if truncation is None:
        # torch draws the last 16 numbers anew if their number is no multiple of 16 (findings/randn_last_sixteen.sh).
        numbers = torch.zeros(-(-count * z_dim // 16) * 16).normal_(generator=rng)
        return numbers[: count * z_dim].view(count, z_dim)
    z = torch.zeros(count, z_dim)
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


def class_number(text: str | None, names: Sequence[str], num_classes: int, option: str = "class-id") -> int | None:
    """Return the class that `text` means, by its number or its name; None for None. A number is always the label.

    Raises InputError for a class there is not, with the nearest name, and for a model without classes.
    """
    if text is None:
        return None
    if num_classes == 0:
        raise InputError(f"{option} cannot be given to a model trained without classes, got {text}")
    text = str(text).strip()
    if text.lstrip("-").isdecimal():
        if not 0 <= int(text) < num_classes:
            raise InputError(f"{option} must be 0 to {num_classes - 1}, got {text}")
        return int(text)
    if text in names:
        return list(names).index(text)
    if not names:
        raise InputError(f"{option} must be 0 to {num_classes - 1}: this model does not name its classes, got {text!r}")
    hint = nearest(text, names) or f": classes are {list_some(names)}"
    raise InputError(f"there is no class {text!r}{hint}; `sagan-fast info` lists the classes of a run")


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


def rows_by_class(
    generator: Generator, chosen: Sequence[int], columns: int, seed: int, truncation: float | None
) -> Rows:
    """Return a row for each of the `chosen` classes; the images of a column have the same z."""
    z = latents(columns, generator.config.z_dim, seed, truncation).repeat(len(chosen), 1)
    labels = [class_name(generator.class_names, i) for i in chosen]
    return z, torch.tensor(chosen).repeat_interleave(columns), labels


def rows_by_truncation(
    generator: Generator, truncations: Sequence[float | None], columns: int, seed: int, class_id: int | None
) -> Rows:
    """Return a row for each of `truncations`; the images of a column come from the same draw."""
    z, y = latents(columns, generator.config.z_dim, seed), classes(columns, generator.config.num_classes, class_id)
    labels = ["untruncated" if truncation is None else f"T = {truncation:g}" for truncation in truncations]
    every = torch.cat([truncated(z, truncation) for truncation in truncations])
    return every, None if y is None else y.repeat(len(truncations)), labels


def rows_between(
    generator: Generator,
    rows: int,
    columns: int,
    seed: int,
    *,
    truncation: float | None = None,
    class_id: int | None = None,
    to_class: int | None = None,
    same_z: bool = False,
) -> Rows:
    """Return rows from one z to another along an arc, or with `same_z` from a z to itself.

    With `to_class` the class goes over to that one. Raises InputError for a class that the generator does not have.
    """
    config, share = generator.config, torch.linspace(0, 1, columns)
    z = latents(2 * rows, config.z_dim, seed, truncation)
    z = slerp(z[::2], z[::2] if same_z else z[1::2], share).flatten(0, 1)
    y, end = (classes(rows, config.num_classes, i) for i in (class_id, to_class))
    if y is None:
        return z, None, [""] * rows
    labels = [class_name(generator.class_names, i) for i in y.tolist()]
    if to_class is None or end is None:
        return z, y.repeat_interleave(columns), labels
    labels = [f"{label} to {class_name(generator.class_names, to_class)}" for label in labels]
    return z, mixed_classes(y, end, share, config.num_classes).flatten(0, 1), labels


def slerp(start: Tensor, end: Tensor, share: Tensor) -> Tensor:
    """Return points (B, T, D) on the arcs from `start` to `end` (B, D), at the `share` (T,) of the way, 0 to 1.

    Directions turn at a steady angle and lengths go linearly, so every point is as typical of a normal z as the ends
    (Shoemake 1985; White 2016, arXiv 1609.04468, §2.1); a straight line would pass near 0. Where the ends point the
    same or opposite ways there is no arc, and the line is taken.
    """
    lengths = start.norm(dim=1)[:, None, None], end.norm(dim=1)[:, None, None]
    a, b = F.normalize(start.double(), dim=1)[:, None], F.normalize(end.double(), dim=1)[:, None]
    t = share.double()[None, :, None]
    angle = (a * b).sum(2, keepdim=True).clamp(-1, 1).acos()
    sine = angle.sin()
    arc = (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / sine.clamp_min(1e-12)
    direction = torch.where(sine > 1e-6, arc, (1 - t) * a + t * b)
    points: Tensor = direction * ((1 - t) * lengths[0] + t * lengths[1])
    return points.to(start.dtype)


def mixed_classes(start: Tensor, end: Tensor, share: Tensor, num_classes: int) -> Tensor:
    """Return weights of the classes (B, T, num_classes), from `start` to `end` (B,) int64 at the `share` (T,) between.

    The generator mixes its class embeddings (the gains and biases of its batch norms) by them.
    """
    a, b = F.one_hot(start, num_classes).float()[:, None], F.one_hot(end, num_classes).float()[:, None]
    return torch.lerp(a, b, share.float()[None, :, None])


def truncated(z: Tensor, truncation: float | None) -> Tensor:
    """Return normal `z` squeezed into [-T, T] so that it is distributed as a normal one cut off there.

    Each number keeps its quantile, so the same z at several T is the same draw, more or less typical. None is z itself.
    Raises InputError unless T is positive.
    """
    if truncation is None:
        return z
    if not truncation > 0:
        raise InputError(f"truncation must be positive, got {truncation}")
    low, high = torch.special.ndtr(torch.tensor([-truncation, truncation], dtype=torch.float64))
    squeezed: Tensor = torch.special.ndtri(low + torch.special.ndtr(z.double()) * (high - low))
    return squeezed.clamp(-truncation, truncation).to(z.dtype)
