"""`sagan-fast evaluate`: scores of a checkpoint or a folder of images, with their protocol."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sagan_fast.commands.options import command_parser, said_once
from sagan_fast.distributed import rank
from sagan_fast.errors import InputError
from sagan_fast.files import explained, written

TIMEOUT = 3600
"""Seconds that a process waits for the others, of which the first also computes the scores of the real images."""

SCORES = (
    # key, its deviation, name, better
    ("fid", None, "FID", "lower"),
    ("is", "is_std", "IS", "higher"),
    ("kid", "kid_std", "KID", "lower"),
    ("precision", None, "precision", "higher"),
    ("recall", None, "recall", "higher"),
    ("density", None, "density", "higher"),
    ("coverage", None, "coverage", "higher"),
    ("intra_fid", None, "intra-FID", "lower"),
)


def run(args: list[str]) -> None:
    """Parse and run `sagan-fast evaluate`."""
    parser = command_parser(
        "evaluate",
        "Score a checkpoint's samples, or a folder of images, against real images: IS, FID, KID, precision, recall, "
        "density, coverage and the FID of each class. Statistics of the real images are kept in $SAGAN_FAST_CACHE "
        "(~/.cache/sagan_fast). Under torchrun the processes share the work.",
    )
    parser.add_argument("generated", help="run folder, checkpoint file, folder of images, or SPEC of a data set")
    parser.add_argument("--data", required=True, help="real images: shapes, folder:PATH, packed:PATH or cifar10:PATH")
    parser.add_argument("--count", type=int, help="generated images; 50000 of a checkpoint, all of a folder")
    parser.add_argument("--json", help="write scores and protocol to this file")
    parser.add_argument("--protocol", default="clean", help="clean, or official: as the released SAGAN was scored")
    parser.add_argument("--features", default="inception", help="inception, efficientnet-lite0 or a TorchScript file")
    parser.add_argument("--inception_weights", help="file of torch-fidelity's Inception weights, instead of a download")
    parser.add_argument("--metrics", default="all", help="some of fid,is,kid,prdc,intra_fid")
    parser.add_argument("--last", action="store_true", help="the last weights instead of the averaged ones")
    parser.add_argument("--seed", type=int, help="of the samples, and of the choice of real images (0)")
    parser.add_argument("--truncation", type=float, help="draw z within [-T, T]")
    parser.add_argument("--batch_norm", help="running averages (default), statistics of each batch, or standing ones")
    parser.add_argument("--standing_batches", type=int, help="batches that standing statistics average over (200)")
    parser.add_argument("--reference_count", type=int, help="real images, a fixed random choice; all if not given")
    parser.add_argument("--feature_resize", help="tf1-bilinear or antialias-bicubic")
    parser.add_argument("--feature_size", type=int, help="side that images are resized to for the features")
    parser.add_argument("--quantise", help="generated images as uint8 or none (floats)")
    parser.add_argument("--splits", type=int, help="parts whose inception scores are averaged")
    parser.add_argument("--kid_subsets", type=int, help="subsets KID is averaged over (100)")
    parser.add_argument("--kid_subset_size", type=int, help="images in each (1000)")
    parser.add_argument("--neighbours", type=int, help="k of precision, recall, density and coverage (5)")
    parser.add_argument("--keep", type=int, help="images whose features are kept for KID and precision (10000)")
    parser.add_argument("--resolution", type=int, help="crop and resize all images to this; only with a folder")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--batch_size", type=int, help="images at a time (64)")
    parser.add_argument("--num_workers", type=int, default=0, help="processes that read images")
    with said_once():
        options = parser.parse_args(args)
        target = Path(options.json) if options.json else None
        if target is not None:
            _check_writable(target)
    from sagan_fast.distributed import connected

    with connected(options.device, TIMEOUT) as world:
        result = _evaluate(options, str(world.device))
    if result is None:
        return
    if target is not None:
        with written(target) as file:
            file.write(json.dumps(result, indent=1).encode() + b"\n")
    _print(result)
    if target is not None:
        print(f"scores and protocol in {target}")


def _evaluate(options: Any, device: str) -> dict[str, Any] | None:
    from sagan_fast.data import open_dataset
    from sagan_fast.evaluation.evaluate import dataset_source, evaluate, evaluate_generator, generator_source
    from sagan_fast.evaluation.features import open_extractor
    from sagan_fast.evaluation.protocol import METRICS, Protocol
    from sagan_fast.evaluation.streams import StoredImages

    metrics = METRICS if options.metrics == "all" else tuple(options.metrics.split(","))
    spec = _spec(options.generated)
    overrides = {
        name: options[name]
        for name in (
            "count", "reference_count", "feature_resize", "feature_size", "quantise", "splits", "batch_norm",
            "standing_batches", "truncation", "seed", "batch_size", "kid_subsets", "kid_subset_size", "neighbours",
            "keep",
        )
    }  # fmt: skip
    overrides["weights"] = "last" if options.last else None
    if spec is None:
        if options.resolution is not None:
            raise InputError("resolution is the checkpoint's own: --resolution is for folders of images")
        protocol = Protocol.preset(options.protocol, **overrides)
        generator, source = generator_source(Path(options.generated), protocol.weights, device)
        dataset = open_dataset(
            options.data, resolution=generator.config.resolution, num_classes=generator.config.num_classes
        )
    else:
        for name in ("truncation", "batch_norm", "standing_batches", "quantise"):
            if options[name] is not None:
                raise InputError(f"{name} is for checkpoints, and {options.generated} holds images")
        if options.last:
            raise InputError(f"last is for checkpoints, and {options.generated} holds images")
        stored = open_dataset(spec, resolution=options.resolution)
        images = StoredImages(
            stored,
            options.count,
            seed=options.seed or 0,
            batch_size=options.batch_size or Protocol.batch_size,
            num_workers=options.num_workers,
        )
        # What is said of a generator does not apply; uint8 is what files hold.
        protocol = Protocol.preset(options.protocol, **{**overrides, "count": images.count, "quantise": "uint8"})
        dataset = open_dataset(options.data, resolution=stored.resolution)
        source = dataset_source(stored)
    extractor = open_extractor(
        options.features,
        resize=protocol.feature_resize,
        size=protocol.feature_size,
        inception_weights=options.inception_weights,
        device=device,
    )
    common: dict[str, Any] = {"source": source, "metrics": metrics, "num_workers": options.num_workers}
    with _progress() as progress:
        if spec is None:
            return evaluate_generator(generator, dataset, extractor, protocol, progress=progress, **common)
        return evaluate(images, dataset, extractor, protocol, progress=progress, **common)


def _spec(generated: str) -> str | None:
    """Return the data set that `generated` stands for; None for a run or checkpoint."""
    from sagan_fast.data import SPECS

    path = Path(generated).expanduser()
    if not path.exists() and generated.partition(":")[0] in SPECS:
        return generated
    if path.is_dir() and not (path / "checkpoints").exists() and not (path / "config.yaml").exists():
        return f"folder:{generated}"
    return None


@contextmanager
def _progress() -> Iterator[Callable[[str, int], Callable[[int], None]] | None]:
    """Yield what shows progress on a terminal; None elsewhere."""
    if not sys.stderr.isatty() or rank():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bars:

        def begin(label: str, count: int) -> Callable[[int], None]:
            task = bars.add_task(label, total=count)
            return lambda done: bars.advance(task, done)

        yield begin


def _check_writable(target: Path) -> None:
    """Raise InputError before the work, not after it."""
    if target.is_dir():
        raise InputError(f"--json must name a file, and {target} is a folder")
    with explained(f"cannot write {target}"):
        target.parent.mkdir(parents=True, exist_ok=True)
    is_pipe = target.exists() and not target.is_file()
    if not os.access(target if is_pipe else target.parent, os.W_OK):
        raise InputError(f"cannot write {target}: its folder cannot be written")


def _print(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    protocol = result["protocol"]
    features, generated = protocol["features"], protocol["generated"]
    what = f"{generated['weights']} weights of step {generated['step']}" if "step" in generated else generated["data"]
    table = Table(
        title=f"{what}: {protocol['count']} images against {protocol['reference_count']} of {protocol['real']['data']}",
        caption=f"{features['name']} ({features['sha256'][:8]}), {features['resize']} to {features['size']}; protocol "
        f"{protocol['name']}, {protocol['quantise']}, seed {protocol['seed']}",
    )
    for heading in ("score", "value", "deviation", "better"):
        table.add_column(heading, justify="left" if heading in ("score", "better") else "right")
    for key, deviation, name, better in SCORES:
        if key in result:
            spread = f"{result[deviation]:.4g}" if deviation else ""
            table.add_row(name, f"{result[key]:.5g}", spread, better)
    console = Console(soft_wrap=True) if not sys.stdout.isatty() else Console()
    console.print(table)
    per_class = result.get("intra_fid_per_class", {})
    for which in ("worst", "best"):
        names = result.get(f"intra_fid_{which}", [])
        if names:
            listed = ", ".join(f"{name} {per_class[name]:.4g}" for name in names)
            console.print(f"{which} classes: {listed}", markup=False, highlight=False)
    for note in result["notes"]:
        console.print(f"note: {note}", markup=False, highlight=False)
