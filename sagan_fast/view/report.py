"""Writes what the page shows as one HTML file that needs nothing else: no scripts, no network."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor

from sagan_fast.evaluation.sampling import class_name
from sagan_fast.view import curves, scores
from sagan_fast.view.history import History
from sagan_fast.view.model import COLUMNS, Model
from sagan_fast.view.source import View, png
from sagan_fast.visualize.attention_figure import figure, figure_row
from sagan_fast.visualize.attention_maps import attention_input, attention_layer, spread_queries
from sagan_fast.words import counted

CLASSES = 20
"""Most rows of samples; of more classes, evenly spread ones."""
TRUNCATIONS = (0.3, 0.6, 1.0, None)
PICTURES = 6
"""Most grids of samples over time."""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
SHOWN = 4
"""Samples whose attention is drawn."""


def report(source: Path, device: torch.device) -> str:
    """Return the report of `source`, a run, checkpoint or exported folder, as HTML.

    Raises InputError if there is nothing to show or the checkpoint cannot be read.
    """
    view = View(source, device)
    history, model = view.history, view.model
    parts = [f'<p class="card">{escape(view.missing)}</p>'] if model is None else _of_model(model)
    if history.folder is not None:
        parts += _of_run(history)
    name, about = escape(source.resolve().name), ""
    if model is not None:
        config = model.generator.config
        step = "" if model.step is None else f"Weights of step {model.step:,}, "
        about = f"{step}{config.resolution} x {config.resolution} pixels, {counted(config.num_classes, 'class')}"
    style = (files("sagan_fast.view") / "static" / "style.css").read_text()
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{name} - sagan-fast</title><style>{style}</style></head>"
        f"<body><header><h1>{name}</h1><p>{about}</p></header><main>{''.join(parts)}</main></body></html>\n"
    )


def _of_model(model: Model) -> list[str]:
    number, names = model.generator.config.num_classes, model.generator.class_names
    chosen: list[int | None] = [None] * COLUMNS
    if number:
        some = torch.linspace(0, number - 1, min(number, CLASSES)).round().int().tolist()
        chosen = list(dict.fromkeys(some))
    images = [image for _, image in model.samples(chosen, COLUMNS, 0, None)]
    labels = ["" if k is None else class_name(names, k) for k in chosen]
    of = "" if len(chosen) >= number else f" {len(chosen)} of the {number} classes."
    out = [_section("Samples", f"The samples of a column have the same random numbers.{of}", _rows(images, labels))]

    images = [image for t in TRUNCATIONS for _, image in model.samples(chosen[:1], COLUMNS, 0, t)]
    words = f"The same draws{f' of {labels[0]}' if labels[0] else ''}, from more typical to untruncated."
    out.append(_section("Truncation", words, _rows(images, ["off" if t is None else f"{t:g}" for t in TRUNCATIONS])))

    paths, labels = [], []
    for row in range(min(3, len(chosen))):
        ends = [chosen[row], chosen[-1 - row]]
        start, end = (f"{'-' if k is None else k}.0.{2 * row + i}" for i, k in enumerate(ends))
        paths += list(model.between(start, end, COLUMNS, None))
        labels.append(" to ".join(dict.fromkeys(class_name(names, k) for k in ends if k is not None)))
    out.append(_section("Between two samples", "Each row goes from one sample to another.", _rows(paths, labels)))
    return out + _attention(model, chosen)


def _attention(model: Model, chosen: Sequence[int | None]) -> list[str]:
    """Return the attention figures of both networks for samples of some classes."""
    out = []
    some = list(dict.fromkeys(chosen[:: max(1, len(chosen) // SHOWN)]))[:SHOWN]
    z = torch.stack([model.latent(0, i) for i in range(SHOWN if some == [None] else len(some))]).to(model.device)
    y = None if some == [None] else torch.tensor(some, device=model.device)
    with torch.no_grad():
        images = model.generator(z, y)
    for what, network, inputs in (
        ("generator", model.generator, (z, y)),
        ("discriminator", model.discriminator, (images, y)),
    ):
        if network is None or not model.layers[what[0]]:
            continue
        name, layer = attention_layer(network)
        xs, _ = attention_input(network, layer, *inputs)
        titles = [""] * len(xs) if y is None else [class_name(model.generator.class_names, k) for k in y.tolist()]
        rows = [figure_row(image, layer, x[None], spread_queries(layer, x[None], 5), title)
                for image, x, title in zip(images.cpu(), xs, titles, strict=True)]  # fmt: skip
        words = f"Layer {name}, gamma {layer.gamma.item():+.3f}. The first point has the most concentrated attention."
        shown = f'<img src="{png(figure(rows))}" alt="Attention maps of the {what}">'
        out.append(_section(f"Where the {what} looks", words, f'<div class="scroll">{shown}</div>'))
    return out


def _of_run(history: History) -> list[str]:
    out = [_section("Curves", "", f'<div class="charts">{curves.charts(history.lines())}</div>'),
           _section("Scores", "", scores.tables(history.scores()))]  # fmt: skip
    pictures = history.pictures()
    places = torch.linspace(0, len(pictures) - 1, min(len(pictures), PICTURES)).round().int().tolist()
    figures = [(f"After step {pictures[i].step:,}", pictures[i].path) for i in places]
    if data := history.picture("data.png"):
        figures.append(("Real images, for comparison", data))
    shown = "".join(
        f'<figure><img src="{_inlined(path)}" alt="{words}"><figcaption>{words}</figcaption></figure>'
        for words, path in figures
    )
    shown = f'<div class="over-time">{shown}</div>'
    out.append(_section("Samples over time", "Grids of the same random numbers.", shown))
    if config := history.config():
        shown = f"<details><summary>config.yaml</summary><dl>{scores.entries(config)}</dl></details>"
        out.append(_section("Configuration", "", shown))
    return out


def _section(title: str, words: str, content: str) -> str:
    about = f'<p class="help">{escape(words)}</p>' if words else ""
    return f'<section class="card"><h2>{title}</h2>{about}{content}</section>'


def _rows(images: Sequence[Tensor], labels: Sequence[str]) -> str:
    """Return `images` in rows of COLUMNS, each with its label; without any labels, a plain grid."""
    out = []
    for i, label in enumerate(labels):
        cells = "".join(
            f'<img src="{png(image)}" alt="{escape(label) or "sample"}">'
            for image in images[i * COLUMNS : (i + 1) * COLUMNS]
        )
        cells = f'<div class="cells">{cells}</div>'
        out.append(f'<div class="row"><span>{escape(label)}</span>{cells}</div>' if any(labels) else cells)
    return f'<div class="grid">{"".join(out)}</div>'


def _inlined(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
