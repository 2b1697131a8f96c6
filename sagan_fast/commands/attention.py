"""`sagan-fast attention`: what chosen points of an image attend to, as in the paper's figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sagan_fast.commands.options import command_parser
from sagan_fast.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

ABOUT = """Show where a network's attention looks: each image with coloured dots, then for each dot a dimmed copy, lit
where the dot looks. The generator is shown on samples; the discriminator on real images (--data) or on samples."""


def run(args: list[str]) -> None:
    """Parse and run `sagan-fast attention`."""
    parser = command_parser("attention", ABOUT)
    parser.add_argument("checkpoint", help="run folder or checkpoint file; an exported folder has the generator only")
    parser.add_argument("--out", required=True, help="PNG file of the figure: a row an image")
    parser.add_argument("--sweep", help="also a GIF or APNG file: a point moving over each image, and where it looks")
    parser.add_argument(
        "--network", choices=("g", "d"), help="g the generator, d the discriminator (the default with --data)"
    )
    parser.add_argument("--data", help="real images for the discriminator: shapes, folder:PATH, packed:PATH, ...")
    parser.add_argument(
        "--layer", help="of several attention layers, by name or map size (attentions.32 or 32); else the finest"
    )
    parser.add_argument(
        "--points",
        default="auto",
        help="where to ask, 'x,y x,y ...' in pixels from the upper left corner; auto takes the place whose attention "
        "is most concentrated, then again and again the one farthest from all before, in place and in what it looks at",
    )
    parser.add_argument("--num_points", type=int, default=5, help="how many points auto takes")
    parser.add_argument("--count", type=int, default=4, help="number of images")
    parser.add_argument("--class_id", type=int, help="one class only; without, as many different ones as there are")
    parser.add_argument("--seed", type=int, default=0, help="chooses the samples or the images")
    parser.add_argument("--truncation", type=float, help="draw z of the samples within [-T, T]")
    parser.add_argument("--frames", type=int, default=96, help="positions of the sweep, at most")
    parser.add_argument("--last", action="store_true", help="the generator's last weights instead of the averaged ones")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    options = parser.parse_args(args)
    out, sweep = Path(options.out), Path(options.sweep) if options.sweep else None
    network = _check(options, out, sweep)
    points = None if options.points == "auto" else read_points(options.points)
    import torch

    from sagan_fast.distributed import pick_device
    from sagan_fast.models.checkpoint import load_discriminator, load_generator
    from sagan_fast.visualize.animation import save_animation
    from sagan_fast.visualize.attention_figure import figure, figure_row, sweep_frames
    from sagan_fast.visualize.attention_maps import attention_input, attention_layer, positions_at, spread_queries
    from sagan_fast.visualize.grids import save_png

    device = pick_device(options.device)
    shown: Any
    names: Sequence[str]
    if options.data:
        shown = load_discriminator(options.checkpoint, device=str(device))
        images, y, names = _real_images(options, shown.config)
        inputs = (images.to(device), None if y is None else y.to(device))
    else:
        generator = load_generator(options.checkpoint, average=not options.last, device=str(device))
        z, y = _latents(options, generator.config)
        names = generator.class_names
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
        rows.append(figure_row(image, layer, x, queries, None if y is None else _name(names, int(y[i]))))
    save_png(figure(rows), out)
    keys = f"{map_size[0] // 2}x{map_size[1] // 2} pooled keys" if layer.pool else "as many keys"
    what = {"g": "generator", "d": "discriminator"}[network]
    print(f"{name} of the {what}: {map_size[0]}x{map_size[1]} queries, {keys}, gamma {layer.gamma.item():+.3f}")
    print(f"{len(images)} images in {out}")
    if sweep is not None:
        frames = sweep_frames(images, layer, xs, options.frames)
        save_animation(frames, sweep)
        print(f"{len(frames)} frames in {sweep}")


def read_points(text: str) -> list[tuple[float, float]]:
    """Return the (x, y) in `text`, "x,y x,y ..."; InputError if it says anything else."""
    try:
        points = [(float(x), float(y)) for x, y in (pair.split(",") for pair in text.split())]
    except ValueError:
        points = []
    if not points:
        raise InputError(f"points must be auto or pairs of pixels such as '12,40 30,8', got {text!r}")
    return points


def _check(options: Any, out: Path, sweep: Path | None) -> str:
    """Return the network to show; InputError for options that do not fit each other."""
    from sagan_fast.visualize.animation import SUFFIXES

    for name in ("count", "num_points", "frames"):
        if options[name] < 1:
            raise InputError(f"{name} must be positive, got {options[name]}")
    if out.suffix.lower() != ".png":
        raise InputError(f"--out must name a .png file, got {out}")
    if sweep is not None and sweep.suffix.lower() not in SUFFIXES:
        raise InputError(f"--sweep must name a .gif or .apng file, got {sweep}")
    if options.data and options.network == "g":
        raise InputError("--data shows real images, which only the discriminator sees: leave out --network g or --data")
    for name in ("truncation", "last"):
        if options.data and options[name]:
            raise InputError(f"--{name} is for samples, and --data shows real images: give one of them")
    return options.network or ("d" if options.data else "g")


def _latents(options: Any, config: Any) -> tuple[Tensor, Tensor | None]:
    from sagan_fast.evaluation.sampling import classes, latents

    z = latents(options.count, config.z_dim, options.seed, options.truncation)
    return z, classes(options.count, config.num_classes, options.class_id)


def _real_images(options: Any, config: Any) -> tuple[Tensor, Tensor | None, list[str]]:
    """Return images (B, 3, R, R) in [-1, 1], their classes and the names of these, of the classes samples would have.

    They come in the order that `--seed` shuffles the data set into.
    """
    import torch

    from sagan_fast.data import open_dataset
    from sagan_fast.data.loader import epoch_order
    from sagan_fast.evaluation.sampling import classes

    dataset = open_dataset(options.data, resolution=config.resolution, num_classes=config.num_classes)
    y = classes(options.count, config.num_classes, options.class_id)
    order = epoch_order(len(dataset), options.seed, 0)
    if y is None:
        chosen = order[: options.count].tolist()
    else:
        of_class = {label: iter(order[dataset.labels[order] == label].tolist()) for label in set(y.tolist())}
        chosen = [i for label in y.tolist() if (i := next(of_class[label], None)) is not None]
    images, labels = zip(*(dataset[i] for i in chosen), strict=True)
    real = torch.stack(images).float() / 127.5 - 1
    return real, None if y is None else torch.tensor(labels), dataset.class_names


def _name(names: Any, class_id: int) -> str:
    return names[class_id] if class_id < len(names) else f"class {class_id}"
