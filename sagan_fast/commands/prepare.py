"""`sagan-fast prepare` packs a data set of any known format, or checks a packed one."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from sagan_fast.choices import OnBroken, SourceKind, check_least
from sagan_fast.commands.options import read_options
from sagan_fast.errors import InputError
from sagan_fast.words import counted

if TYPE_CHECKING:
    from sagan_fast.data.packed import Manifest
    from sagan_fast.data.packed_writer import Progress

SECONDS_BETWEEN_LINES = 30.0
"""Of progress, where the output is no terminal."""


@dataclass
class Options:
    """Write a packed set: the images of a data set, decoded, cropped and resized once.

    Then train with --data packed:OUT. The source is a folder or a zip archive of images. It can also be tar shards in
    the WebDataset layout, TFRecord files, or an HDF5 file of BigGAN-PyTorch or StudioGAN. docs/data.md says what is
    read as the label. The path may contain wildcards, {a,b} and {0000..0099}. To continue an interrupted preparation,
    run the same command again.
    """

    source: str
    """path of the data set; with --check, the folder of the packed set"""
    out: str | None = None
    """folder for the packed set; required except with --check"""
    size: int | None = None
    """width and height of the packed images in pixels; required except with --check"""
    source_kind: Literal["auto", SourceKind] = "auto"
    """format of the source; auto recognises it from the first bytes of its files"""
    num_workers: int | None = None
    """number of decoding processes; default: one per processor"""
    on_broken: OnBroken = "fail"
    """what to do with an image that cannot be read: fail, or skip it and list it in broken.txt"""
    first_label: int | None = None
    """label of the first class in the source, 0 or 1; default: 0, and labels that leave 0 out are refused"""
    classes: str | None = None
    """text file with one class name per line, in the order of the labels"""
    unlabelled: Literal["false", "true"] = "false"
    """true reads the images without labels, whatever looks like a label beside them"""
    check: bool = False
    """compare all pixels of a packed set with their checksums, and its source if it is there; change nothing"""


def run(args: list[str]) -> None:
    """Parse and run `sagan-fast prepare`."""
    options = read_options("prepare", Options, args, positional=("source", "out"))
    if options.check:
        if options.out is not None:
            raise InputError("--check takes one folder, the packed set")
        _check(options.source)
        return
    from sagan_fast.data.classes import read_classes
    from sagan_fast.data.packed import MANIFEST
    from sagan_fast.data.prepare import packed_on, prepare
    from sagan_fast.data.sources import open_source
    from sagan_fast.data.summary import described
    from sagan_fast.training.signals import stop_on_signals

    if options.out is None or options.size is None:
        raise InputError("prepare needs SOURCE, OUT and --size, as in: sagan-fast prepare images packed --size 128")
    check_least(1, options, "size")
    check_least(0, options, "num_workers")
    names = None if options.classes is None else read_classes(options.classes)
    source = open_source(options.source, options.source_kind, options.first_label, options.unlabelled == "true")
    before = (Path(options.out).expanduser() / MANIFEST).exists()
    answer = "stopping after these images; Ctrl-C again to stop at once"
    with stop_on_signals(answer) as stop, _shown(options.out) as show:
        manifest = prepare(
            source,
            options.out,
            resolution=options.size,
            num_workers=options.num_workers,
            on_broken=options.on_broken,
            class_names=names,
            on_progress=show,
            stop=lambda: bool(stop),
        )
    if manifest is None:
        raise KeyboardInterrupt(f"{options.out}: stopped as asked; the same command goes on")
    if before:
        print(f"{options.out}: already packed on {packed_on(Path(options.out).expanduser())}; nothing was read")
    print(f"{_summary(options.out, manifest)}; train with --data packed:{options.out}")
    for line in described(manifest.class_names, manifest.class_counts, source.labels_from, source.passed_over):
        print(line)
    if manifest.num_broken:
        print(f"{manifest.num_broken} could not be read and were left out: {Path(options.out, 'broken.txt')}")


def _check(folder: str) -> None:
    from sagan_fast.data.packed_check import check
    from sagan_fast.data.prepare import compare_with_source

    with _shown(folder) as show:
        manifest = check(folder, on_progress=show)
    print(f"{_summary(folder, manifest)}: all right")
    print(compare_with_source(folder))


def _summary(folder: str, manifest: Manifest) -> str:
    classes = counted(len(manifest.class_names), "class")
    size = f"{manifest.resolution}x{manifest.resolution}"
    return f"{folder}: {counted(manifest.num_images, 'image')} of {size}, {classes}"


@contextmanager
def _shown(out: str) -> Iterator[Callable[[Progress], None]]:
    """Yield a function that shows progress: a bar on a terminal, else a line every 30 seconds."""
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    began, first, said = time.monotonic(), -1, time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Bar(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(out, total=None)

        def show(progress: Progress) -> None:
            nonlocal first, said
            now = time.monotonic()
            first = progress.images if first < 0 else first
            rate = (progress.images - first) / max(now - began, 1e-9)
            text = f"{counted(progress.images, 'image')}, {rate:.0f}/s"
            if progress.broken:
                text += f", {len(progress.broken)} broken"
            bar.update(task, total=progress.total, completed=progress.position, description=text)
            if not console.is_terminal and now - said > SECONDS_BETWEEN_LINES:
                share = progress.position / max(progress.total, 1)
                print(f"{out}: {share:.0%}, {text}", file=sys.stderr, flush=True)
                said = now

        yield show
