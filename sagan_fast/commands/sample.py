"""`sagan-fast sample` generates images from a run or checkpoint: single files, a grid, or rows that show one change."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sagan_fast.choices import Device, check_least
from sagan_fast.commands.options import dashed, read_options
from sagan_fast.errors import InputError
from sagan_fast.words import counted

MOST_CLASSES = 100
"""Rows that --by-class draws without being told which."""
_NAME = re.compile(r"\d{6}(_class\d+)?\.png")
"""Of the files that this command writes to a folder."""
NO_TRUNCATION = "none"
PICTURES = (".png", ".jpg", ".jpeg", ".gif", ".apng", ".mp4", ".bmp", ".webp", ".tif", ".tiff")


@dataclass
class Options:
    """Generate images with the EMA generator (averaged weights) of a run or checkpoint.

    By default each image is a PNG file of its own. --grid writes one picture. --by-class, --interpolate and a list of
    truncations write one picture with rows.
    """

    checkpoint: str
    """run folder, checkpoint file or exported folder"""
    out: str = field(metadata={"metavar": "FILE_OR_FOLDER"})
    """folder for the PNG files, or one .npz file with uint8 images (N, H, W, 3) as arr_0 and labels as arr_1; with
    --grid, --count 1 or for a picture with rows, one PNG file"""
    count: int | None = None
    """number of images (default: 64). In a picture with rows: images per row (default: 8); with --interpolate: rows
    (default: 8)"""
    class_id: str | None = None
    """generate only this class, by number or name; default: all classes, equally often"""
    seed: int = 0
    """random seed; the same seed gives the same images"""
    truncation: str | None = None
    """truncation trick: draw z from a normal distribution truncated to [-T, T]. A list such as 0.3,0.6,1,none gives one
    row per value, from the same random numbers"""
    grid: bool = False
    """write all images into one PNG, eight per row, with the names of their classes"""
    by_class: bool = False
    """write one PNG with a labelled row per class"""
    classes: str | None = field(default=None, metadata={"metavar": "CLASSES"})
    """classes for --by-class by number or name, such as 0,ring,10-14; default: all"""
    interpolate: bool = False
    """interpolate from one z to another in each row (slerp); a GIF, APNG or MP4 plays the path forwards and
    backwards"""
    to_class: str | None = None
    """with --interpolate: change the class from --class-id to this one"""
    same_z: bool = False
    """with --interpolate: keep z and change only the class"""
    frames: int | None = None
    """with --interpolate: images per path (default: 8 in a PNG, 30 in an animation)"""
    last: bool = False
    """use the weights of the last step instead of the EMA weights"""
    device: Device = "auto"
    """where to compute; auto takes cuda if available, else cpu. mps (Apple GPUs) is untested"""
    batch_size: int = 64
    """number of images generated at a time"""
    overwrite: bool = False
    """replace the images that an earlier `sagan-fast sample` wrote to the folder --out; other files stay"""


def run(args: list[str]) -> None:
    """Parse and run `sagan-fast sample`."""
    options = read_options("sample", Options, args, positional=("checkpoint",))
    out, truncations = Path(options.out), read_truncations(options.truncation)
    rows = _check(options, out, truncations)
    count, moving = options.count or (8 if rows else 64), out.suffix.lower() != ".png"
    frames = options.frames or (30 if moving else 8)
    import torch

    from sagan_fast.distributed import pick_device
    from sagan_fast.evaluation import sampling
    from sagan_fast.models.checkpoint import load_generator
    from sagan_fast.visualize.animations import save_animation
    from sagan_fast.visualize.grids import (
        grid,
        grid_by_class,
        labelled_grid,
        save_npz,
        save_png,
        to_uint8,
    )

    device = pick_device(options.device)
    generator = load_generator(options.checkpoint, average=not options.last, device=str(device))
    config, names, seed, labels = generator.config, generator.class_names, options.seed, [""]
    class_id = sampling.class_number(options.class_id, names, config.num_classes)
    to_class = sampling.class_number(options.to_class, names, config.num_classes, "to-class")
    if rows == "by_class":
        chosen = read_classes(options.classes, config.num_classes, names)
        z, y, labels = sampling.rows_by_class(generator, chosen, count, seed, truncations[0])
    elif rows == "truncation":
        z, y, labels = sampling.rows_by_truncation(generator, truncations, count, seed, class_id)
    elif rows == "interpolate":
        z, y, labels = sampling.rows_between(
            generator, count, frames, seed, truncation=truncations[0], class_id=class_id, to_class=to_class,
            same_z=options.same_z,
        )  # fmt: skip
    else:
        z = sampling.latents(count, config.z_dim, seed, truncations[0])
        y = sampling.classes(count, config.num_classes, class_id)
    images = sampling.sample(generator, z, y, options.batch_size)
    if rows and moving:
        whole = torch.cat(list(images))
        there = [grid(whole[i::frames], min(4, count)) for i in range(frames)]
        save_animation(there + there[-2:0:-1], out)
        print(f"{counted(count, 'path')} of {counted(frames, 'image')} in {out}")
    elif rows:
        save_png(labelled_grid(torch.cat(list(images)), labels), out)
        print(f"{counted(len(labels), 'row')} of {counted(len(z) // len(labels), 'image')} in {out}")
    elif options.grid:
        save_png(grid_by_class(torch.cat(list(images)), y, names, min(8, count)), out)
        print(f"{counted(count, 'image')} in {out}")
    elif out.suffix.lower() == ".npz":
        save_npz(torch.cat([to_uint8(batch) for batch in images]), y, out)
        print(f"{counted(count, 'image')} in {out}")
    elif out.suffix.lower() == ".png":
        save_png(to_uint8(next(iter(images)))[0], out)
        print(f"1 image in {out}")
    else:
        earlier = written_before(out)
        for number, image in enumerate(image for batch in images for image in to_uint8(batch)):
            path = out / f"{number:06d}{'' if y is None else f'_class{int(y[number])}'}.png"
            save_png(image, path)
            earlier.discard(path)
        for path in earlier:  # only now: if the sampling fails, they are still there
            path.unlink(missing_ok=True)
        print(f"{counted(count, 'image')} in {out}")


def written_before(out: Path) -> set[Path]:
    """Return the images in the folder `out` that this command wrote, by their names."""
    return {path for path in out.iterdir() if _NAME.fullmatch(path.name)} if out.is_dir() else set()


def read_truncations(text: str | None) -> list[float | None]:
    """Return the truncations in `text`, "0.5" or "0.3,1,none"; InputError for any other text."""
    if text is None:
        return [None]
    try:
        return [None if part.strip() == NO_TRUNCATION else float(part) for part in str(text).split(",")]
    except ValueError:
        raise InputError(f"truncation must be numbers or none, such as 0.5 or 0.3,1,none, got {text}") from None


def read_classes(text: str | None, num_classes: int, names: Sequence[str] = ()) -> list[int]:
    """Return the classes in `text`, "0,ring,10-14", or all; InputError for unknown classes and for too many."""
    if num_classes == 0:
        raise InputError("--by-class cannot be given for a model trained without classes")
    if text is None:
        if num_classes > MOST_CLASSES:
            raise InputError(f"there are {num_classes} classes: choose some, such as --classes 0-{MOST_CLASSES - 1}")
        return list(range(num_classes))
    from sagan_fast.evaluation.sampling import class_number

    chosen: list[int] = []
    for part in text.split(","):
        ends = re.fullmatch(r"\s*(\d+)\s*-\s*(\d+)\s*", part)
        if ends:
            chosen += range(int(ends[1]), int(ends[2]) + 1)
        elif part.strip():
            chosen.append(class_number(part, names, num_classes, "classes") or 0)
    if not chosen or max(chosen) >= num_classes:
        raise InputError(f"classes must be some of 0 to {num_classes - 1}, such as 0,2-4, got {text}")
    return chosen


def _check(options: Options, out: Path, truncations: list[float | None]) -> str | None:
    """Return the kind of rows: "by_class", "interpolate", "truncation" or None; InputError for options that clash."""
    check_least(1, options, "count", "batch_size", "frames")
    made = [name for name in ("by_class", "interpolate") if getattr(options, name)]
    made += ["truncation"] if len(truncations) > 1 else []
    if len(made) > 1:
        first, second = ("several truncations" if name == "truncation" else f"--{dashed(name)}" for name in made[:2])
        raise InputError(f"{first} and {second} both make rows: give one of them")
    rows = made[0] if made else None
    for name, needed in (("to_class", "interpolate"), ("same_z", "interpolate"), ("frames", "interpolate"),
                         ("classes", "by_class")):  # fmt: skip
        if getattr(options, name) not in (None, False) and rows != needed:
            raise InputError(f"--{dashed(name)} goes with --{dashed(needed)} only")
    if options.same_z and options.to_class is None:
        raise InputError("--same-z without --to-class would not change anything: give the class to go to")
    if rows == "by_class" and options.class_id is not None:
        raise InputError("--class-id and --by-class cannot be given together: --classes chooses the rows")
    if rows == "interpolate":
        from sagan_fast.visualize.animations import check_animation

        check_animation(out, "out")
    elif rows and out.suffix.lower() != ".png":
        what = "several truncations" if rows == "truncation" else f"--{dashed(rows)}"
        raise InputError(f"--out must name a .png file with {what}, got {out}")
    if not rows and options.grid and out.suffix.lower() != ".png":
        raise InputError(f"--out must name a .png file with --grid, got {out}")
    if rows or options.grid or out.suffix.lower() == ".npz":
        return rows
    if out.suffix.lower() in PICTURES and (options.count != 1 or out.suffix.lower() != ".png"):
        raise InputError(
            f"--out {out} names one picture, and each image is a file of its own: add --grid for one picture of all, "
            f"or name a folder, such as {out.with_suffix('')}"
        )
    if out.is_file() and options.count != 1:
        raise InputError(f"--out must name a folder without --grid, and {out} is a file")
    if (earlier := written_before(out)) and not options.overwrite:
        raise InputError(
            f"{out} holds {counted(len(earlier), 'image')} of an earlier `sagan-fast sample`, which would be "
            "mixed with the new ones: name another folder, or add --overwrite to replace them"
        )
    return rows
