"""Lays rows of the attention map of chosen queries over the image.

Positions of a map are flat, row * W + column, as in `SelfAttention2d.attention_map`; points are (x, y) in pixels of the
image, from its upper left corner.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sagan_fast.errors import InputError
from sagan_fast.layers.self_attention import SelfAttention2d
from sagan_fast.models.generator import in_eval_mode

CANDIDATES = 12
"""Positions a side that `spread_queries` chooses from."""
MARGIN = 0.1
"""Share of the image, along each border, that it leaves out: the border is a distant place, but seldom the subject."""
SMALL_GAMMA = 0.01
"""Below it a block adds almost nothing to its input, and its maps say little."""
CLOSE = 0.2
"""Two of its points are neighbours, dots that nearly touch, under this share of the grid's diagonal."""


def attention_layers(network: nn.Module) -> dict[str, SelfAttention2d]:
    """Return the attention layers of `network` by their names in the state dict."""
    return {name: module for name, module in network.named_modules() if isinstance(module, SelfAttention2d)}


def attention_layer(network: nn.Module, wanted: str | None = None) -> tuple[str, SelfAttention2d]:
    """Return name and module of the attention layer of `network` that `wanted` names, by name or map size.

    Names are those of the state dict, "attentions.32"; "32" will do. Without `wanted`, the layer with the finest map.
    Raises InputError for a network without attention, and for a layer there is not.
    """
    layers = attention_layers(network)
    what = type(network).__name__.lower()
    if not layers:
        raise InputError(f"the {what} has no attention layer, so there is nothing to look at")
    if wanted is None:
        return max(layers.items(), key=lambda layer: int("0" + "".join(filter(str.isdigit, layer[0]))))
    for name in (wanted, f"attentions.{wanted}"):
        if name in layers:
            return name, layers[name]
    raise InputError(f"the {what} has no attention layer {wanted!r}: it has {', '.join(layers)}")


@torch.no_grad()
def attention_input(network: nn.Module, layer: SelfAttention2d, *inputs: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return (what `layer` is given, what `network` returns) for `network(*inputs)`, run in eval mode.

    Modes are put back afterwards; batch-norm statistics and spectral norm's u and v are not moved.
    """
    seen: list[Tensor] = []
    with in_eval_mode(network), layer.register_forward_pre_hook(lambda _, args: seen.append(args[0])):
        out: Tensor = network(*inputs)
    return seen[0], out


@torch.no_grad()
def rows_of(layer: SelfAttention2d, x: Tensor, queries: Sequence[int] | Tensor) -> Tensor:
    """Return the rows (len(queries), M) of `layer`'s map for the single input `x` (1, C, H, W), in eval mode."""
    with in_eval_mode(layer):
        return layer.attention_map(x, queries)[0].float()


def positions_at(points: Sequence[tuple[float, float]], map_size: tuple[int, int], resolution: int) -> list[int]:
    """Return the map positions whose cells hold `points`, (x, y) in pixels of an image of `resolution`.

    Raises InputError for a point outside the image.
    """
    H, W = map_size
    for x, y in points:
        if not (0 <= x < resolution and 0 <= y < resolution):
            raise InputError(f"points must lie in the image, x and y in 0 to {resolution - 1}, got {x:g},{y:g}")
    return [int(y * H / resolution) * W + int(x * W / resolution) for x, y in points]


def centre_of(position: int, map_size: tuple[int, int], height: int, width: int) -> tuple[float, float]:
    """Return (x, y) of the centre of the cell `position` on a picture of `height` x `width` pixels."""
    H, W = map_size
    return (position % W + 0.5) * width / W, (position // W + 0.5) * height / H


def spread_queries(layer: SelfAttention2d, x: Tensor, count: int) -> list[int]:
    """Return `count` positions of the single input `x` (1, C, H, W) that are worth looking at.

    They are cells of a regular grid over the middle of the image. The first has the most concentrated attention, the
    lowest entropy. Each next one is farthest from all before it. The distance is that of their places plus that of
    their rows (Hellinger), each divided by its largest value; neighbours come last. Only the grid's rows are computed.
    """
    H, W = x.shape[2:]
    ys, xs = (torch.linspace(MARGIN * side, (1 - MARGIN) * side - 1, min(CANDIDATES, side)).round() for side in (H, W))
    places = torch.unique(torch.cartesian_prod(ys, xs), dim=0)
    queries = (places[:, 0] * W + places[:, 1]).long()
    rows = rows_of(layer, x, queries).cpu()
    far, unlike = (d / d.max().clamp_min(1e-12) for d in (torch.cdist(t, t) for t in (places, rows.sqrt())))
    apart = torch.where(far < CLOSE, far - 1, far + unlike)
    chosen = [int(torch.special.entr(rows).sum(1).argmin())]
    while len(chosen) < min(count, len(queries)):
        chosen.append(int(apart[:, chosen].amin(1).argmax()))
    return [int(query) for query in queries[chosen]]


def on_picture(rows: Tensor, map_size: tuple[int, int], pool: bool, height: int, width: int) -> Tensor:
    """Return attention `rows` (Q, M) as pictures (Q, `height`, `width`), bilinear between the centres of the keys.

    A pooled key stands for its 2x2 cell of the H x W map; an odd last row or column belongs to no key and gets 0.
    Values are shares per key, as in `rows`.
    """
    H, W = map_size
    step = 2 if pool else 1
    h, w = H // step, W // step
    keys = rows.reshape(-1, 1, h, w)
    y = (torch.arange(height, device=rows.device, dtype=rows.dtype) + 0.5) * H / height
    x = (torch.arange(width, device=rows.device, dtype=rows.dtype) + 0.5) * W / width
    grid = torch.stack(torch.meshgrid(2 * x / (w * step) - 1, 2 * y / (h * step) - 1, indexing="xy"), -1)
    out = F.grid_sample(keys, grid.expand(len(keys), -1, -1, -1), padding_mode="border", align_corners=False)
    inside = (y < h * step)[:, None] & (x < w * step)
    return out[:, 0] * inside


def heat(pictures: Tensor, peaks: Tensor) -> Tensor:
    """Return `pictures` (Q, h, w) of attention as brightness: 0 at a picture's smallest value, up to 1 at its largest.

    `peaks` (Q,) are the largest weights divided by that of even attention. The brightest spot is 1 for a peak of 2 or
    more, else sqrt(peak - 1), so that nearly even attention looks faint.
    """
    low, high = pictures.amin((1, 2), keepdim=True), pictures.amax((1, 2), keepdim=True)
    strength = (peaks - 1).clamp(0, 1).sqrt()[:, None, None]
    return (pictures - low) / (high - low).clamp_min(1e-30) * strength
