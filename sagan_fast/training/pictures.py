"""The pictures of a run: its data, its samples, and what its attention looks at."""

import json
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from sagan_fast.data import ImageDataset
from sagan_fast.data.summary import pictured, record
from sagan_fast.errors import InputError
from sagan_fast.evaluation.sampling import latents, sample
from sagan_fast.files import written
from sagan_fast.training.config import TrainConfig
from sagan_fast.training.log import Log
from sagan_fast.training.run import Run
from sagan_fast.visualize.attention_figure import figure, figure_row
from sagan_fast.visualize.attention_maps import attention_input, attention_layer, spread_queries
from sagan_fast.visualize.grids import grid_by_class, labelled_grid, save_png

ROWS, COLUMNS = 10, 8
"""Of a grid of samples: classes, and images of each."""
ATTENTION_ROWS, ATTENTION_POINTS = 4, 4
"""Of the attention figure in TensorBoard: images, and query points in each."""


def save_data(dataset: ImageDataset, path: Path) -> Tensor:
    """Write and return a picture of eight images of up to five classes, with their names.

    What was found goes to a .json beside it. What cannot be read is left white: the training will say so when it needs
    it.
    """
    indices, names = pictured(dataset)
    images = torch.ones(indices.size, 3, dataset.resolution, dataset.resolution)
    for place, index in enumerate(indices.reshape(-1).tolist()):
        with suppress(InputError):
            images[place] = dataset.load(index).float() / 127.5 - 1
    picture = labelled_grid(images, names)
    save_png(picture, path)
    with written(path.with_suffix(".json")) as file:
        file.write(json.dumps(record(dataset), indent=1).encode() + b"\n")
    return picture


def show_samples(run: Run, log: Log, path: Path) -> None:
    """Write a grid of samples to `path`, and show it with attention maps of the first of them in TensorBoard."""
    state, config = run.state, run.config
    turn = max(state.step - 1, 0) // config.sample_every
    z, y = sampled(config, turn)
    images = torch.cat(list(sample(state.ema, z, y)))
    picture = grid_by_class(images, y, run.dataset.class_names, COLUMNS)
    save_png(picture, path)
    log.picture("samples", picture, state.step)
    if config.generator.attention_resolutions:
        name, layer = attention_layer(state.ema)
        few = slice(None, None, COLUMNS * max(1, len(z) // COLUMNS // ATTENTION_ROWS))
        device = run.world.device
        seen, shown = attention_input(state.ema, layer, z[few].to(device), None if y is None else y[few].to(device))
        rows = [
            figure_row(image, layer, x[None], spread_queries(layer, x[None], ATTENTION_POINTS))
            for image, x in zip(shown.cpu(), seen, strict=True)
        ]
        log.picture(f"attention/generator.{name}", figure(rows), state.step)


def sampled(config: TrainConfig, turn: int) -> tuple[Tensor, Tensor | None]:
    """Return z and classes of the grid number `turn`: rows of ROWS classes, which follow each other from grid to grid.

    The z are the same in every grid. With at most ROWS classes, all are in each.
    """
    rows = min(config.num_classes, ROWS) or COLUMNS
    z = latents(rows * COLUMNS, config.generator.z_dim, config.seed)
    if not config.num_classes:
        return z, None
    start = turn * rows if config.num_classes > ROWS else 0
    return z, ((start + torch.arange(rows)) % config.num_classes).repeat_interleave(COLUMNS)
