"""`sagan-fast sample`: images from a run or checkpoint, singly, in grids, in rows that show what a change does."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sagan_fast.commands.options import command_parser
from sagan_fast.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from sagan_fast.models.generator import Generator

MOST_CLASSES = 100
"""Rows that --by_class draws without being told which."""
NO_TRUNCATION = "none"


def run(args: list[str]) -> None:
    """Parse and run `sagan-fast sample`."""
    parser = command_parser("sample", "Draw images from the averaged generator of a run or checkpoint.")
    parser.add_argument("checkpoint", help="run folder, checkpoint file or exported folder")
    parser.add_argument("--out", required=True, help="PNG file with --grid, else a folder that gets one PNG an image")
    parser.add_argument(
        "--count",
        type=int,
        help="number of images (64); of columns or, to interpolate, rows where rows are asked for (8)",
    )
    parser.add_argument("--class_id", type=int, help="one class only; without, an even share of each")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same images")
    parser.add_argument(
        "--truncation",
        type=str,
        help="draw z within [-T, T]: less varied, more typical; several, such as 0.3,0.6,1,none, give a row each, of "
        "the same draws",
    )
    parser.add_argument("--grid", action="store_true", help="one PNG with all images, eight a row")
    parser.add_argument("--by_class", action="store_true", help="one PNG with a row a class, its name beside it")
    parser.add_argument("--classes", help="the classes of --by_class, such as 0,5,10-14; without, all")
    parser.add_argument(
        "--interpolate",
        action="store_true",
        help="a row each from one z to another along an arc, in a PNG, or there and back in a GIF or APNG",
    )
    parser.add_argument("--to_class", type=int, help="to interpolate: the class changes too, from --class_id to this")
    parser.add_argument("--same_z", action="store_true", help="to interpolate: z stays, only the class changes")
    parser.add_argument("--frames", type=int, help="to interpolate: images from end to end (PNG 8, GIF 30)")
    parser.add_argument("--last", action="store_true", help="the last weights instead of the averaged ones")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--batch_size", type=int, default=64, help="images at a time")
    options = parser.parse_args(args)
    out, truncations = Path(options.out), read_truncations(options.truncation)
    rows = _check(options, out, truncations)
    if options.count is None:
        options.count = 8 if rows else 64
    from sagan_fast.distributed import pick_device
    from sagan_fast.evaluation.sampling import classes, latents, sample
    from sagan_fast.models.checkpoint import load_generator
    from sagan_fast.visualize.grids import save_grid, save_png, to_uint8

    device = pick_device(options.device)
    generator = load_generator(options.checkpoint, average=not options.last, device=str(device))
    if rows:
        {"by_class": _by_class, "interpolate": _interpolate, "truncation": _sweep}[rows](
            generator, options, out, truncations
        )
        return
    z = latents(options.count, generator.config.z_dim, options.seed, truncations[0])
    y = classes(options.count, generator.config.num_classes, options.class_id)
    images = sample(generator, z, y, options.batch_size)
    if options.grid:
        import torch

        save_grid(torch.cat(list(images)), out, min(8, options.count))
        print(f"{options.count} images in {out}")
        return
    number = 0
    for batch in images:
        for image in to_uint8(batch):
            label = "" if y is None else f"_class{int(y[number])}"
            save_png(image, out / f"{number:06d}{label}.png")
            number += 1
    print(f"{number} images in {out}")


def read_truncations(text: str | None) -> list[float | None]:
    """Return the truncations in `text`, "0.5" or "0.3,1,none"; InputError if it says anything else."""
    if text is None:
        return [None]
    try:
        return [None if part.strip() == NO_TRUNCATION else float(part) for part in str(text).split(",")]
    except ValueError:
        raise InputError(f"truncation must be numbers or none, such as 0.5 or 0.3,1,none, got {text}") from None


def read_classes(text: str | None, num_classes: int) -> list[int]:
    """Return the classes in `text`, "0,5,10-14", or all; InputError for a class there is not and for too many."""
    if num_classes == 0:
        raise InputError("--by_class cannot be given for a model trained without classes")
    if text is None:
        if num_classes > MOST_CLASSES:
            raise InputError(
                f"the model has {num_classes} classes: choose some, such as --classes 0-{MOST_CLASSES - 1}"
            )
        return list(range(num_classes))
    try:
        ends = [[int(end) for end in part.split("-")] for part in text.split(",")]
        chosen = [i for first, *last in ends for i in range(first, (last or [first])[0] + 1)]
    except ValueError:
        chosen = []
    if not chosen or max(chosen) >= num_classes:
        raise InputError(f"classes must be some of 0 to {num_classes - 1}, such as 0,2-4, got {text}")
    return chosen


def _check(options: Any, out: Path, truncations: list[float | None]) -> str | None:
    """Return what makes rows: "by_class", "interpolate", "truncation" or nothing; InputError for what does not fit."""
    for name in ("count", "batch_size", "frames"):
        if options[name] is not None and options[name] < 1:
            raise InputError(f"{name} must be positive, got {options[name]}")
    made = [name for name in ("by_class", "interpolate") if options[name]]
    made += ["truncation"] if len(truncations) > 1 else []
    if len(made) > 1:
        raise InputError(f"--{made[0]} and {'several truncations' if made[1] == 'truncation' else '--' + made[1]} "
                         "both make rows: give one of them")  # fmt: skip
    rows = made[0] if made else None
    for name, needed in (("to_class", "interpolate"), ("same_z", "interpolate"), ("frames", "interpolate"),
                         ("classes", "by_class")):  # fmt: skip
        if options[name] not in (None, False) and rows != needed:
            raise InputError(f"--{name} goes with --{needed} only")
    if options.same_z and options.to_class is None:
        raise InputError("--same_z without --to_class would not change anything: give the class to go to")
    if rows == "by_class" and options.class_id is not None:
        raise InputError("--class_id and --by_class cannot be given together: --classes chooses the rows")
    suffixes = (".png", ".gif", ".apng") if rows == "interpolate" else (".png",)
    if rows and out.suffix.lower() not in suffixes:
        what = "several truncations" if rows == "truncation" else f"--{rows}"
        raise InputError(f"--out must name a {' or '.join(suffixes)} file with {what}, got {out}")
    if not rows and options.grid and out.suffix.lower() != ".png":
        raise InputError(f"--out must name a .png file with --grid, got {out}")
    if not rows and not options.grid and out.is_file():
        raise InputError(f"--out must name a folder without --grid, and {out} is a file")
    return rows


def _by_class(generator: Generator, options: Any, out: Path, truncations: list[float | None]) -> None:
    """Write a row a class; the columns share their z, so that only the class differs in one."""
    import torch

    from sagan_fast.evaluation.sampling import latents

    chosen = read_classes(options.classes, generator.config.num_classes)
    z = latents(options.count, generator.config.z_dim, options.seed, truncations[0])
    y = torch.tensor(chosen).repeat_interleave(options.count)
    _save_rows(generator, z.repeat(len(chosen), 1), y, [_name(generator, i) for i in chosen], options, out)


def _sweep(generator: Generator, options: Any, out: Path, truncations: list[float | None]) -> None:
    import torch

    from sagan_fast.evaluation.interpolation import truncated
    from sagan_fast.evaluation.sampling import classes, latents

    z = latents(options.count, generator.config.z_dim, options.seed)
    y = classes(options.count, generator.config.num_classes, options.class_id)
    every = torch.cat([truncated(z, truncation) for truncation in truncations])
    labels = ["untruncated" if truncation is None else f"T = {truncation:g}" for truncation in truncations]
    _save_rows(generator, every, None if y is None else y.repeat(len(truncations)), labels, options, out)


def _interpolate(generator: Generator, options: Any, out: Path, truncations: list[float | None]) -> None:
    import torch

    from sagan_fast.evaluation.interpolation import mixed_classes, slerp
    from sagan_fast.evaluation.sampling import classes, latents, sample
    from sagan_fast.visualize.animation import save_animation
    from sagan_fast.visualize.grids import grid

    paths, config = options.count, generator.config
    moving = out.suffix.lower() != ".png"
    frames = options.frames or (30 if moving else 8)
    share = torch.linspace(0, 1, frames)
    z = latents(2 * paths, config.z_dim, options.seed, truncations[0])
    z = slerp(z[::2], z[::2] if options.same_z else z[1::2], share)
    y, labels = classes(paths, config.num_classes, options.class_id), [""] * paths
    if y is not None:
        labels = [_name(generator, int(i)) for i in y]
        weights = y[:, None].expand(-1, frames)
        if options.to_class is not None:
            end = classes(paths, config.num_classes, options.to_class)
            assert end is not None
            weights = mixed_classes(y, end, share, config.num_classes)
            labels = [f"{label} to {_name(generator, options.to_class)}" for label in labels]
        y = weights.flatten(0, 1)
    elif options.to_class is not None:
        raise InputError(f"to_class cannot be given to a model trained without classes, got {options.to_class}")
    if not moving:
        _save_rows(generator, z.flatten(0, 1), y, labels, options, out)
        return
    images = torch.cat(list(sample(generator, z.flatten(0, 1), y, options.batch_size)))
    there = [grid(images[i::frames], min(4, paths)) for i in range(frames)]
    save_animation(there + there[-2:0:-1], out)
    print(f"{paths} paths of {frames} images in {out}")


def _save_rows(
    generator: Generator, z: Tensor, y: Tensor | None, labels: list[str], options: Any, out: Path
) -> None:  # fmt: skip
    import torch

    from sagan_fast.evaluation.sampling import sample
    from sagan_fast.visualize.grids import labelled_grid, save_png

    images = torch.cat(list(sample(generator, z, y, options.batch_size)))
    save_png(labelled_grid(images, labels), out)
    print(f"{len(labels)} rows of {len(images) // len(labels)} images in {out}")


def _name(generator: Generator, class_id: int) -> str:
    names = generator.class_names
    return names[class_id] if class_id < len(names) else f"class {class_id}"
