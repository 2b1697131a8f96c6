"""`sagan-fast attention` draws what chosen points of an image attend to, as in the paper's figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sagan_fast.choices import Device, check_least
from sagan_fast.commands.options import read_options
from sagan_fast.errors import InputError
from sagan_fast.words import counted

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Options:
    """Draw attention maps of the generator or the discriminator.

    The figure shows each image with coloured dots, the query points. Beside it stands the attention map of each dot, in
    the colour of the dot. The images are samples, or for the discriminator also real images (--data).
    """

    checkpoint: str
    """run folder or checkpoint file; an exported folder works for the generator only"""
    out: str = field(metadata={"metavar": "FILE"})
    """PNG file for the figure, with one row per image"""
    sweep: str | None = None
    """GIF, APNG or MP4 file for an animation: a query point moves over each image"""
    network: Literal["g", "d"] | None = None
    """g (generator) or d (discriminator); default: d with --data, else g"""
    data: str | None = None
    """real images for the discriminator: shapes, folder:PATH, packed:PATH or cifar10:PATH"""
    layer: str | None = None
    """attention layer by name or map size, such as attentions.32 or 32; default: the one with the largest map"""
    points: str = "auto"
    """query points: 'x,y x,y ...' in pixels from the upper left corner, or auto. auto starts at the point with the most
    concentrated attention. Each further point differs most from the ones before, in its place and in its map"""
    num_points: int = 5
    """number of points that auto chooses"""
    count: int = 4
    """number of images"""
    class_id: str | None = None
    """show only this class, by number or name; default: as many different classes as possible"""
    seed: int = 0
    """random seed of the samples or of the choice of real images"""
    truncation: float | None = None
    """truncation trick: draw z from a normal distribution truncated to [-T, T]"""
    frames: int = 96
    """maximum number of query points in the animation of --sweep"""
    last: bool = False
    """use the generator's weights of the last step instead of its EMA weights"""
    device: Device = "auto"
    """where to compute; auto takes cuda if available, else cpu. mps (Apple GPUs) is untested"""


def run(args: list[str]) -> None:
    """Parse and run `sagan-fast attention`."""
    options = read_options("attention", Options, args, positional=("checkpoint",))
    out, sweep = Path(options.out), Path(options.sweep) if options.sweep else None
    network = _check(options, out, sweep)
    points = None if options.points == "auto" else read_points(options.points)
    import torch

    from sagan_fast.distributed import pick_device
    from sagan_fast.evaluation.sampling import class_name, class_number, classes, latents
    from sagan_fast.models.checkpoint import load_discriminator, load_generator
    from sagan_fast.visualize.animations import save_animation
    from sagan_fast.visualize.attention_figure import figure, figure_row, sweep_frames
    from sagan_fast.visualize.attention_maps import (
        SMALL_GAMMA,
        attention_input,
        attention_layer,
        positions_at,
        spread_queries,
    )
    from sagan_fast.visualize.grids import save_png

    device = pick_device(options.device)
    shown: Any
    names: Sequence[str]
    if options.data:
        shown = load_discriminator(options.checkpoint, device=str(device))
        images, y, names = _real_images(options, options.data, shown.config)
        inputs = (images.to(device), None if y is None else y.to(device))
    else:
        generator = load_generator(options.checkpoint, average=not options.last, device=str(device))
        config, names = generator.config, generator.class_names
        z = latents(options.count, config.z_dim, options.seed, options.truncation)
        y = classes(options.count, config.num_classes, class_number(options.class_id, names, config.num_classes))
        shown, inputs = generator, (z.to(device), None if y is None else y.to(device))
        if network == "d":
            shown = load_discriminator(options.checkpoint, device=str(device))
            with torch.no_grad():
                inputs = (generator(*inputs), inputs[1])
    name, layer = attention_layer(shown, options.layer)
    xs, result = attention_input(shown, layer, *inputs)
    images = (result if network == "g" else inputs[0]).cpu()
    map_size = (xs.shape[2], xs.shape[3])
    rows = []
    for i, image in enumerate(images):
        x = xs[i : i + 1]
        if points is None:
            queries = spread_queries(layer, x, options.num_points)
        else:
            queries = positions_at(points, map_size, images.shape[-1])
        rows.append(figure_row(image, layer, x, queries, None if y is None else class_name(names, int(y[i]))))
    save_png(figure(rows), out)
    keys = f"{map_size[0] // 2}x{map_size[1] // 2} pooled keys" if layer.pool else "as many keys"
    what = {"g": "generator", "d": "discriminator"}[network]
    print(f"{name} of the {what}: {map_size[0]}x{map_size[1]} queries, {keys}, gamma {layer.gamma.item():+.3f}")
    if abs(layer.gamma.item()) < SMALL_GAMMA:
        print(
            f"note: |gamma| is below {SMALL_GAMMA}, so the block adds almost nothing to its input: its maps say little"
        )
    print(f"{counted(len(images), 'image')} in {out}")
    if sweep is not None:
        frames = sweep_frames(images, layer, xs, options.frames)
        save_animation(frames, sweep)
        print(f"{counted(len(frames), 'frame')} in {sweep}")


def read_points(text: str) -> list[tuple[float, float]]:
    """Return the (x, y) in `text`, "x,y x,y ..."; InputError for any other text."""
    try:
        points = [(float(x), float(y)) for x, y in (pair.split(",") for pair in text.split())]
    except ValueError:
        points = []
    if not points:
        raise InputError(f"points must be auto or pairs of pixels such as '12,40 30,8', got {text!r}")
    return points


def _check(options: Options, out: Path, sweep: Path | None) -> str:
    """Return the network to show; InputError for options that do not fit each other."""
    from sagan_fast.visualize.animations import check_animation

    check_least(1, options, "count", "num_points", "frames")
    if out.suffix.lower() != ".png":
        raise InputError(f"--out must name a .png file, got {out}")
    if sweep is not None:
        check_animation(sweep, "sweep")
    if options.data and options.network == "g":
        raise InputError("--data shows real images, which only the discriminator sees: leave out --network g or --data")
    for name in ("truncation", "last"):
        if options.data and getattr(options, name):
            raise InputError(f"--{name} is for samples, and --data shows real images: give one of them")
    return options.network or ("d" if options.data else "g")


def _real_images(options: Options, data: str, config: Any) -> tuple[Tensor, Tensor | None, list[str]]:
    """Return real images (B, 3, R, R) in [-1, 1], their classes and the names of all classes.

    The classes are those that samples would have. `--seed` shuffles the data set before images are taken.
    """
    import torch

    from sagan_fast.data import open_dataset
    from sagan_fast.data.loader import epoch_order
    from sagan_fast.evaluation.sampling import class_number, classes

    dataset = open_dataset(data, resolution=config.resolution, num_classes=config.num_classes, on_broken="skip")
    class_id = class_number(options.class_id, dataset.class_names, config.num_classes)
    y = classes(options.count, config.num_classes, class_id)
    order = epoch_order(len(dataset), options.seed, 0)
    if y is None:
        chosen = order[: options.count].tolist()
    else:
        of_class = {label: iter(order[dataset.labels[order] == label].tolist()) for label in set(y.tolist())}
        chosen = [i for label in y.tolist() if (i := next(of_class[label], None)) is not None]
    images, labels = zip(*(dataset[i] for i in chosen), strict=True)
    real = torch.stack(images).float() / 127.5 - 1
    return real, None if y is None else torch.tensor(labels), dataset.class_names
