"""`sagan-fast evaluate` scores a checkpoint or a folder of images and states the protocol."""

from __future__ import annotations

import inspect
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sagan_fast.choices import Float64Device, OnBroken, ProtocolName
from sagan_fast.commands.options import add_options, command_parser, said_once
from sagan_fast.errors import InputError
from sagan_fast.evaluation.protocol import BESIDE, FACE_RATE, GAN_TEST, METRICS, Protocol, check_metrics
from sagan_fast.files import RUN, check_exists, explained, written
from sagan_fast.words import counted

if TYPE_CHECKING:
    from sagan_fast.data import ImageDataset

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
OTHER_NAMES = {"face_rate": FACE_RATE, "gan_test": GAN_TEST, "intra-fid": "intra_fid"}
LISTED = 12
"""Up to so many classes, the GAN-test of each is printed; of more classes, that of the worst three."""


@dataclass
class Options:
    """Score the samples of a checkpoint, or a folder of images, against real images.

    The scores are IS, FID, KID, precision, recall, density, coverage and intra-FID (FID per class). Statistics of the
    real images are cached in $SAGAN_FAST_CACHE (default ~/.cache/sagan_fast). Under torchrun the processes share the
    work.
    """

    generated: str
    """what to score: run folder, checkpoint file, exported folder, folder or .npz file of images, or data set such as
    packed:PATH"""
    data: str
    """real images: shapes, or folder, packed, cifar10, cifar100 or npz with :PATH; or FILE.npz with mu and sigma,
    for FID alone"""
    json: str | None = None
    """JSON file for the scores and their protocol"""
    save_statistics: str | None = None
    """.npz file for mean (mu) and covariance (sigma) of the real images' features"""
    protocol: ProtocolName = "clean"
    """set of defaults for the options below: clean as in clean-fid, official as in the released SAGAN code"""
    features: str = "inception"
    """network that computes the features: inception, dinov2, efficientnet-lite0 or a TorchScript file"""
    inception_weights: str | None = None
    """file with the weights of inception (torch-fidelity's) or dinov2 (ViT-L/14); default: download them"""
    metrics: str = "all"
    """scores to compute: all, or some of fid,is,kid,prdc,intra_fid,gan-test,face-rate; the last two are not part of
    all. gan-test is the share of images whose class a classifier trained on --data recognises (Shmelkov et al. 2018).
    face-rate is the share of images with a face and needs --face-weights"""
    face_weights: str | None = None
    """file of FaceBoxes weights for the metric face-rate"""
    last: bool = False
    """use the weights of the last step instead of the EMA weights"""
    classes: str | None = None
    """text file with the class names of --data in the order of its labels, one per line"""
    on_broken: OnBroken = "fail"
    """what to do with an image that cannot be read: fail, or read another of its class instead and say so"""
    unlabelled: Literal["false", "true"] = "false"
    """true reads the real images without labels, whatever looks like a label beside them"""
    resolution: int | None = None
    """crop and resize all images to this width and height; not for checkpoints, which have their own"""
    device: Float64Device = "auto"
    """where to compute; auto takes cuda if available"""
    num_workers: int = 0
    """number of processes that read images"""


def run(args: list[str]) -> None:
    """Parse and run `sagan-fast evaluate`."""
    with said_once():
        options, overrides = _parse(args)
        target, save_to = (Path(name) if name else None for name in (options.json, options.save_statistics))
        if _spec(options.generated) is None:
            check_exists(Path(options.generated), RUN)
        for option, path in (("json", target), ("save-statistics", save_to)):
            if path is not None:
                _check_writable(option, path)
    from sagan_fast.distributed import connected
    from sagan_fast.evaluation.evaluate import evaluate

    with connected(options.device, TIMEOUT) as world:
        what = world.together(lambda: _opened(options, overrides, str(world.device)))
        faces, gan_test = what.pop("faces"), what.pop("gan_test")
        with _progress(world.is_main) as progress:
            result: dict[str, Any] | None = {}
            if what["metrics"]:
                result = world.together(lambda: evaluate(**what, progress=progress, save_to=save_to))
            if faces is not None:
                from sagan_fast.faces.rate import with_face_rates

                scores = result
                result = world.together(lambda: with_face_rates(scores, what, faces, world, progress))
            if gan_test:
                from sagan_fast.evaluation.gan_test import with_gan_test

                so_far = result
                result = world.together(lambda: with_gan_test(so_far, what, world, progress))
    if result is None:
        return
    if target is not None:
        with written(target) as file:
            file.write(json.dumps(result, indent=1).encode() + b"\n")
    _print(result)
    if target is not None:
        print(f"scores and protocol in {target}")


def _parse(args: list[str]) -> tuple[Options, dict[str, Any]]:
    """Return the options, and those values of the protocol that were given."""
    parser = command_parser("evaluate", inspect.getdoc(Options) or "")
    add_options(parser, Options, positional=("generated",))
    add_options(parser, Protocol, skip=("name", "weights"))
    given = parser.parse_args(args, defaults=False).as_dict()
    own = {field.name: given.pop(field.name) for field in fields(Options) if field.name in given}
    options = Options(**own)
    if options.last:
        given["weights"] = "last"
    return options, given


def _opened(options: Options, overrides: dict[str, Any], device: str) -> dict[str, Any]:
    """Return the arguments of `evaluate`: images, real images, features and protocol."""
    from sagan_fast.data import open_dataset
    from sagan_fast.evaluation.evaluate import dataset_source, generator_source
    from sagan_fast.evaluation.features import open_extractor
    from sagan_fast.evaluation.streams import GeneratedImages, Images, StoredImages

    names = [OTHER_NAMES.get(name, name) for name in options.metrics.split(",")]
    asked = list(dict.fromkeys(one for name in names for one in (METRICS if name == "all" else [name])))
    faces = _face_detector(options, device) if FACE_RATE in asked else None
    metrics = check_metrics((name for name in asked if name not in BESIDE), beside=BESIDE)
    spec = _spec(options.generated)
    reading: Any = {
        "on_broken": options.on_broken, "classes": options.classes or "", "unlabelled": options.unlabelled == "true",
    }  # fmt: skip
    images: Images
    if spec is None:
        if options.resolution is not None:
            raise InputError("resolution is the checkpoint's own: --resolution is for folders of images")
        protocol = Protocol.preset(options.protocol, **overrides)
        generator, source = generator_source(Path(options.generated), protocol.weights, device)
        images, config = GeneratedImages(generator, protocol), generator.config
        known = None if config.num_classes else 0  # which classes they are is compared by name
        dataset = _real(options.data, resolution=config.resolution, num_classes=known, **reading)
        _take_classes(dataset, images.class_names, options.generated, metrics, config.num_classes)
    else:
        for name in ("truncation", "batch_norm", "standing_batches", "quantise", "weights"):
            if name in overrides:
                name = "last" if name == "weights" else name
                raise InputError(f"{name} is for checkpoints, and {options.generated} holds images")
        stored = open_dataset(spec, resolution=options.resolution, on_broken=options.on_broken)
        # What is said of a generator does not apply; uint8 is what files hold.
        protocol = Protocol.preset(options.protocol, **{"count": len(stored), **overrides, "quantise": "uint8"})
        images = StoredImages(
            stored, protocol.count, seed=protocol.seed, batch_size=protocol.batch_size, num_workers=options.num_workers
        )
        dataset = _real(options.data, resolution=stored.resolution, **reading)
        source = dataset_source(stored)
    extractor = open_extractor(
        options.features,
        resize=protocol.feature_resize,
        size=protocol.feature_size,
        inception_weights=options.inception_weights,
        device=device,
    ) if metrics else None  # fmt: skip
    return {
        "generated": images, "dataset": dataset, "extractor": extractor, "protocol": protocol, "source": source,
        "faces": faces, "gan_test": GAN_TEST in asked, "metrics": metrics, "num_workers": options.num_workers,
    }  # fmt: skip


def _face_detector(options: Options, device: str) -> Any:
    from sagan_fast.faces import Detector
    from sagan_fast.faces.weights import WHERE

    if options.face_weights is None:
        raise InputError(f"the metric {FACE_RATE} needs --face-weights FILE: {WHERE}")
    return Detector(options.face_weights, device=device)


def _real(data: str, **reading: Any) -> ImageDataset:
    """Return the real images, or the statistics in a file that stands for them."""
    from sagan_fast.data import open_dataset
    from sagan_fast.evaluation.statistics_file import StatisticsFile

    return StatisticsFile(data) if data.endswith(".npz") and ":" not in data else open_dataset(data, **reading)


def _take_classes(dataset: ImageDataset, names: list[str], of: str, metrics: Sequence[str], num_classes: int) -> None:
    """Label `dataset` as the classes of a checkpoint; other classes are refused where intra-FID compares them."""
    from sagan_fast.data.classes import take_order

    if "intra_fid" not in metrics or not dataset.num_classes:
        return
    try:
        take_order(dataset, names, of)
        if not names and num_classes != dataset.num_classes:  # an old checkpoint
            raise InputError(f"{dataset.name} has {counted(dataset.num_classes, 'class')}, and {of} has {num_classes}")
    except InputError as error:
        raise InputError(f"{error}; --metrics without intra_fid compares them without their classes") from None


def _spec(generated: str) -> str | None:
    """Return the data set that `generated` stands for; None for a run or checkpoint."""
    from sagan_fast.data import SPECS
    from sagan_fast.models.generator import is_exported

    path = Path(generated).expanduser()
    if not path.exists() and generated.partition(":")[0] in SPECS:
        return generated
    if path.suffix == ".npz" and path.is_file():
        return f"npz:{generated}"
    if path.is_dir() and not ((path / "checkpoints").exists() or (path / "config.yaml").exists() or is_exported(path)):
        return f"folder:{generated}"
    return None


@contextmanager
def _progress(is_main: bool) -> Iterator[Callable[[str, int], Callable[[int], None]]]:
    """Yield a function that shows progress, on a terminal only."""
    from rich.console import Console
    from rich.progress import Progress

    shown = is_main and sys.stderr.isatty()
    with Progress(console=Console(stderr=True), transient=True, disable=not shown) as bars:

        def begin(label: str, count: int) -> Callable[[int], None]:
            task = bars.add_task(label, total=count)
            return lambda done: bars.advance(task, done)

        yield begin


def _check_writable(option: str, target: Path) -> None:
    """Raise InputError if `target` cannot be written, before the work begins."""
    if target.is_dir():
        raise InputError(f"--{option} must name a file, and {target} is a folder")
    with explained(f"cannot write {target}"):
        target.parent.mkdir(parents=True, exist_ok=True)
    is_pipe = target.exists() and not target.is_file()
    if not os.access(target if is_pipe else target.parent, os.W_OK):
        raise InputError(f"cannot write {target}: its folder cannot be written")


def _print(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    for key, which in (("face_rate", "generated"), ("face_rate_real", "real")):
        if key in result:
            print(f"face-rate: {result[key]:.4f} of {result[f'{key}_of']} {which} images have a face")
    if "gan_test" in result:
        shares = list(result["gan_test_per_class"].items())
        shown = "by class" if len(shares) <= LISTED else "worst"
        if shown == "worst":
            shares = sorted(shares, key=lambda pair: pair[1])[:3]
        print(
            f"gan-test: {result['gan_test']:.3f} of {result['gan_test_of']} generated images show their class to a "
            f"classifier that knows {result['gan_test_real']:.3f} of held-out real images; {shown}: "
            + ", ".join(f"{name} {share:.2f}" for name, share in shares)
        )
    protocol = result["protocol"]
    if "features" not in protocol:
        return
    features, generated = protocol["features"], protocol["generated"]
    what = f"{generated['weights']} weights of step {generated['step']}" if "step" in generated else generated["data"]
    table = Table(
        title=f"{what}: {counted(protocol['count'], 'image')} against {protocol['reference_count']} of "
        f"{protocol['real']['data']}",
        caption=f"{features['name']} ({features['sha256'][:8]}), {features['resize']} to {features['size']}; protocol "
        f"{protocol['name']}, {protocol['quantise']}, seed {protocol['seed']}; real images "
        f"{protocol['real']['fingerprint'][:8]}",
    )
    for heading in ("score", "value", "deviation", "better"):
        table.add_column(heading, justify="left" if heading in ("score", "better") else "right")
    distance = {"inception": "FID", "dinov2": "FD-DINOv2"}.get(features["name"], "FD")
    for key, deviation, name, better in SCORES:
        name = name.replace("FID", distance)
        if key in result:
            spread = f"{result[deviation]:.4g}" if deviation else ""
            table.add_row(name, f"{result[key]:.5g}", spread, better)
    console = Console(soft_wrap=True) if not sys.stdout.isatty() else Console()
    console.print(table)
    per_class = result.get("intra_fid_per_class", {})
    for which in ("worst", "best"):
        if names := result.get(f"intra_fid_{which}"):
            listed = ", ".join(f"{name} {per_class[name]:.4g}" for name in names)
            console.print(f"{which} classes: {listed}", markup=False, highlight=False)
    for note in result["notes"]:
        console.print(f"note: {note}", markup=False, highlight=False)
