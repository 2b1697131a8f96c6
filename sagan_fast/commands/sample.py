"""`sagan-fast sample`: images from a run or checkpoint."""

from __future__ import annotations

from pathlib import Path

from sagan_fast.commands.options import command_parser
from sagan_fast.errors import InputError


def run(args: list[str]) -> None:
    """Parse and run `sagan-fast sample`."""
    parser = command_parser("sample", "Draw images from the averaged generator of a run or checkpoint.")
    parser.add_argument("checkpoint", help="run folder or checkpoint file")
    parser.add_argument("--out", required=True, help="PNG file with --grid, else a folder that gets one PNG an image")
    parser.add_argument("--count", type=int, default=64, help="number of images")
    parser.add_argument("--class_id", type=int, help="one class only; without, an even share of each")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same images")
    parser.add_argument("--truncation", type=float, help="draw z within [-T, T]: less varied, more typical")
    parser.add_argument("--grid", action="store_true", help="one PNG with all images, eight a row")
    parser.add_argument("--last", action="store_true", help="the last weights instead of the averaged ones")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--batch_size", type=int, default=64, help="images at a time")
    options = parser.parse_args(args)
    from sagan_fast.evaluation.sampling import classes, latents, sample
    from sagan_fast.models.checkpoint import load_generator
    from sagan_fast.training.loop import pick_device
    from sagan_fast.visualize.grids import save_grid, save_png, to_uint8

    for name in ("count", "batch_size"):
        if options[name] < 1:
            raise InputError(f"{name} must be positive, got {options[name]}")
    out = Path(options.out)
    if options.grid and out.suffix.lower() != ".png":
        raise InputError(f"--out must name a .png file with --grid, got {out}")
    if not options.grid and out.is_file():
        raise InputError(f"--out must name a folder without --grid, and {out} is a file")
    device = pick_device(options.device)
    generator = load_generator(options.checkpoint, average=not options.last, device=str(device))
    z = latents(options.count, generator.config.z_dim, options.seed, options.truncation)
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
