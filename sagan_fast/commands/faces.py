"""`sagan-fast faces` finds faces in pictures, crops them, measures the detector and trains it."""

from __future__ import annotations

import functools
import inspect
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sagan_fast.choices import FacePrecision, Float64Device, OnBroken, check_least
from sagan_fast.commands.options import add_options, command_parser
from sagan_fast.errors import InputError
from sagan_fast.words import counted, nearest

if TYPE_CHECKING:
    from sagan_fast.faces import Detector
    from sagan_fast.faces.crops import Cropped
    from sagan_fast.faces.wider import Picture

MAX_SIDE = 1080
"""Default of the commands. Faces under about 20 pixels are missed in a smaller picture, those over 1000 in a larger."""
STOPPING = "stopping after this step; Ctrl-C again to stop now and lose what came after the last write of last.pth"


@dataclass
class Finding:
    """Options of the commands that find faces."""

    weights: str
    """file of FaceBoxes weights: the published FaceBoxesProd.pth, last.pth of faces train, or an ONNX file of
    faces export"""
    max_side: int = MAX_SIDE
    """shrink larger pictures to this many pixels at their longer side before faces are sought; 0: do not shrink"""
    enlarge: float = 1.0
    """enlarge pictures by this factor before that; faces under about 20 pixels need 2 to 3"""
    precision: FacePrecision = "fp32"
    """precision of the network"""
    compile: bool = False
    """compile the network with torch.compile, for many pictures of one size"""
    on_broken: OnBroken = "fail"
    """what to do with a picture that cannot be read: fail, or leave it out and say so"""
    device: Float64Device = "auto"
    """where to compute; auto takes cuda if available"""


@dataclass
class Detect:
    """Find the faces in pictures.

    The output folder gets a PNG of each picture with its boxes, and faces.json: for each picture its file, width,
    height and faces, each with its box (x1, y1, x2, y2 in pixels) and score. The list of a picture without faces is
    empty. FaceBoxes finds boxes only, no landmarks and no names.
    """

    pictures: str
    """picture, or folder of pictures"""
    out: str
    """folder for the drawn pictures and faces.json"""
    min_score: float = 0.5
    """probability that a box must exceed"""


@dataclass
class Crop:
    """Crop the faces in a folder of photographs, to train on.

    The output folder gets a square PNG of each face, in the sub-folder of its photograph, and manifest.jsonl. Then
    train with --preset faces-64 --data folder:OUT. The squares are centred on the boxes and are not aligned.
    """

    photographs: str
    """folder of photographs"""
    out: str
    """new folder for the crops"""
    size: int = 64
    """width and height of the crops in pixels"""
    margin: float = 0.3
    """what a crop has beyond the longer side of the box at each edge, as a share of that side"""
    min_score: float = 0.8
    """probability that a box must exceed; below 0.75 there are clocks and hands among the faces"""
    min_size: float = 32.0
    """longer side in pixels that a box must have in the photograph"""


@dataclass
class Bench:
    """Measure the detector on this machine: the network as published against its rewrites, turn by turn.

    Times are medians; a speed is frames per second. python -m benchmarks.bench_faces in the repository measures more.
    """

    weights: str
    """file of FaceBoxes weights"""
    height: int = 480
    """height of the picture in pixels"""
    width: int = 640
    """width of the picture in pixels"""
    threads: int = 1
    """number of processor threads"""
    rounds: int = 20
    """number of times that each is measured"""
    compile: bool = False
    """measure torch.compile too, which takes about a minute"""


@dataclass
class Export:
    """Write the rewritten network as an ONNX file, for ONNX Runtime and for --weights of the other commands."""

    weights: str
    """file of FaceBoxes weights"""
    out: str = field(metadata={"metavar": "FILE"})
    """ONNX file to write"""
    int8: str | None = None
    """folder of pictures such as those to come: quantise to int8, with the ranges that occur in them"""
    calibration: int = 40
    """number of pictures of --int8 to take"""


@dataclass
class Train:
    """Train FaceBoxes on annotated pictures, with the recipe of the paper and of the released code by default.

    The annotations have the format of WIDER FACE's wider_face_train_bbx_gt.txt. The output folder gets last.pth, which
    --weights of the other commands takes, and log.jsonl. Ctrl-C ends the training after the step under way and writes
    last.pth; --resume goes on from there.
    """

    annotations: str
    """file of annotations"""
    images: str
    """folder that the paths in the annotations start from, such as WIDER_train/images"""
    out: str
    """folder of the training"""
    val_annotations: str | None = None
    """file of annotations of other pictures, to score the trained network on"""
    val_images: str | None = None
    """folder of the pictures of --val-annotations"""
    weights: str | None = None
    """file of weights to start from; default: random ones"""
    resume: bool = False
    """continue from last.pth in the output folder if it is there"""
    log_every: int = 50
    """number of steps between two lines of output"""
    save_every: int = 1000
    """number of steps between two writes of last.pth"""
    num_workers: int = 0
    """number of processes that read and augment pictures"""
    on_broken: OnBroken = "fail"
    """what to do with a picture that cannot be read: fail, or take another instead and say so"""
    device: Float64Device = "auto"
    """where to compute; auto takes cuda if available"""


def _train(args: list[str]) -> None:
    from sagan_fast.faces.network import FaceBoxes
    from sagan_fast.faces.train import LAST, Recipe, score, train
    from sagan_fast.training.signals import stop_on_signals

    options, recipe = _read("train", args, (Train, Recipe))
    check_least(1, options, "log_every", "save_every")
    check_least(0, options, "num_workers")
    if (options.val_annotations is None) != (options.val_images is None):
        raise InputError("--val-annotations and --val-images belong together: give both or none")
    out = Path(options.out).expanduser()
    if (out / LAST).exists() and not options.resume:
        raise InputError(f"{out} holds a training already: continue it with --resume, or give another folder")
    pictures = _annotated("training", options.annotations, options.images, options.on_broken)
    held_out = []
    if options.val_annotations and options.val_images:
        held_out = _annotated("validation", options.val_annotations, options.val_images, options.on_broken)
    start = None if options.weights is None else FaceBoxes().load_weights(options.weights)
    say = functools.partial(print, flush=True)

    def show(step: int, line: dict[str, float]) -> None:
        shown = "  ".join(f"{name} {line[name]:.4g}" for name in ("loss", "location", "confidence", "lr"))
        left = timedelta(seconds=round(line["seconds"] * (recipe.steps - step)))
        say(f"step {step}/{recipe.steps}  {shown}  {line['seconds']:.2f} s a step, {left} left")

    try:
        with stop_on_signals(STOPPING) as stopped:
            net, step = train(
                pictures, recipe, out=out, net=start, device=options.device, num_workers=options.num_workers,
                resume=options.resume, on_broken=options.on_broken, log_every=options.log_every,
                save_every=options.save_every, on_line=show, say=say, stop=lambda: bool(stopped),
            )  # fmt: skip
    except KeyboardInterrupt as error:
        kept = "--resume goes on from last.pth" if (out / LAST).exists() else "nothing was saved yet"
        raise KeyboardInterrupt(f"{out}: interrupted; {kept}") from error
    if step < recipe.steps:
        print(f"{out}: stopped as asked at step {step}; the same command with --resume goes on")
        return
    print(f"{out}: done at step {step}; use it with --weights {out / LAST}")
    if held_out:
        found = score(net.cpu(), held_out, on_broken=options.on_broken, say=say)
        print(f"AP@.5 {found.average_precision:.3f}, recall {found.recall:.3f} of {counted(found.faces, 'face')}")


def _annotated(what: str, annotations: str, images: str, on_broken: OnBroken) -> list[Picture]:
    """Return the annotated pictures and say how many there are."""
    from sagan_fast.faces.wider import read_annotations

    found = read_annotations(annotations, images, on_broken)
    faces = counted(sum(len(picture.faces) for picture in found), "face")
    empty = sum(not len(picture.faces) for picture in found)
    print(f"{what}: {counted(len(found), 'picture')} with {faces}, {counted(empty, 'picture')} without", flush=True)
    return found


def _detect(args: list[str]) -> None:
    import torch

    from sagan_fast.faces.crops import detections, photographs
    from sagan_fast.faces.drawing import with_boxes
    from sagan_fast.files import written
    from sagan_fast.visualize.grids import save_png

    options, finding = _read("detect", args, (Detect, Finding), ("pictures",))
    detector, out = _detector(finding, options.min_score), Path(options.out).expanduser()
    pictures = Path(options.pictures).expanduser()
    if pictures.is_dir() and out.resolve().is_relative_to(pictures.resolve()):
        raise InputError(f"{out} is in {pictures}: drawings there would be searched for faces; choose another --out")
    listed, broken, total = photographs(options.pictures), dict[str, str](), 0
    images = []
    for name, pixels, faces in detections(listed, detector, finding.on_broken, broken):
        save_png(torch.from_numpy(with_boxes(pixels, faces)).permute(2, 0, 1), out / f"{name}.png")
        height, width = pixels.shape[:2]
        boxes = [{"box": box, "score": score} for box, score in faces]
        images.append({"file": name, "width": width, "height": height, "faces": boxes})
        total += len(faces)
    with written(out / "faces.json") as file:
        report = {
            "weights_sha256": detector.sha256, "min_score": options.min_score, "max_side": finding.max_side,
            "enlarge": finding.enlarge, "precision": finding.precision, "images": images, "broken": broken,
        }  # fmt: skip
        file.write(json.dumps(report, indent=1).encode() + b"\n")
    print(f"{counted(total, 'face')} in {counted(len(images), 'picture')}: {out / 'faces.json'}")
    _say_broken(broken)


def _crop(args: list[str]) -> None:
    from sagan_fast.faces.crops import MANIFEST, crop_folder

    options, finding = _read("crop", args, (Crop, Finding), ("photographs", "out"))
    out = Path(options.out).expanduser()

    def show(done: Cropped, total: int) -> None:
        if sys.stderr.isatty():
            sys.stderr.write(f"\r{done.photographs}/{total} photographs, {counted(done.crops, 'crop')}")
            sys.stderr.flush()

    done = crop_folder(
        options.photographs, out, _detector(finding, options.min_score), size=options.size, margin=options.margin,
        min_size=options.min_size, on_broken=finding.on_broken, on_progress=show,
    )  # fmt: skip
    if sys.stderr.isatty():
        print(file=sys.stderr)
    crops, photographs = counted(done.crops, "crop"), counted(done.photographs, "photograph")
    small = f", {counted(done.too_small, 'face')} too small" if done.too_small else ""
    print(f"{crops} of {photographs}, {done.without} without a face{small}: {out / MANIFEST}")
    if done.crops:
        print(f"train with: sagan-fast train --preset faces-64 --data folder:{out} --out RUN")
    _say_broken(done.broken)


def _bench(args: list[str]) -> None:
    from sagan_fast.faces.speed import measured

    (options,) = _read("bench", args, (Bench,))
    check_least(1, options, "height", "width", "threads", "rounds")
    times = measured(
        Path(options.weights), options.height, options.width, options.threads, options.rounds, options.compile
    )
    slowest = next(iter(times.values()))
    print(f"{options.width}x{options.height}, threads: {options.threads}")
    for name, seconds in times.items():
        print(f"{name:34} {seconds * 1e3:7.2f} ms {1 / seconds:7.0f} frames/s {slowest / seconds:6.2f}x")


def _export(args: list[str]) -> None:
    from sagan_fast.faces.crops import photographs
    from sagan_fast.faces.network import FaceBoxes
    from sagan_fast.faces.onnx import calibration_pictures, export_onnx
    from sagan_fast.faces.pictures import read_picture

    (options,) = _read("export", args, (Export,))
    check_least(1, options, "calibration")
    out = Path(options.out).expanduser()
    if out.suffix.lower() != ".onnx":
        raise InputError(f"--out must name an .onnx file, got {out}")
    net = FaceBoxes().load_weights(options.weights).eval()
    listed = photographs(options.int8) if options.int8 else []
    export_onnx(net, out, calibration_pictures((read_picture(path) for _, path in listed), options.calibration))
    print(f"{'int8' if listed else 'float32'} network in {out}; use it with --weights {out}")


def _read(action: str, args: list[str], kinds: Sequence[type], positional: Sequence[str] = ()) -> list[Any]:
    """Return one of each of the dataclasses `kinds` with the options of `sagan-fast faces ACTION`."""
    parser = command_parser(f"faces {action}", inspect.getdoc(kinds[0]) or "")
    for kind in kinds:
        add_options(parser, kind, positional if kind is kinds[0] else ())
    given = parser.parse_args(args).as_dict()
    return [kind(**{field.name: given[field.name] for field in fields(kind)}) for kind in kinds]


def _detector(options: Finding, min_score: float) -> Detector:
    from sagan_fast.distributed import pick_device
    from sagan_fast.faces import Detector

    check_least(0, options, "max_side")
    device = "cpu" if options.weights.lower().endswith(".onnx") else pick_device(options.device)
    return Detector(
        options.weights, min_score=min_score, max_side=options.max_side or None, enlarge=options.enlarge,
        precision=options.precision, compile=options.compile, device=device,
    )  # fmt: skip


def _say_broken(broken: dict[str, str]) -> None:
    for sentence in broken.values():
        print(f"left out: {sentence}")


ACTIONS: dict[str, tuple[Callable[[list[str]], None], str]] = {
    "detect": (_detect, "find the faces in pictures, draw and list them"),
    "crop": (_crop, "crop the faces in a folder of photographs, to train on"),
    "train": (_train, "train the detector on pictures annotated as WIDER FACE is"),
    "export": (_export, "write the detector as an ONNX file, also in int8"),
    "bench": (_bench, "measure the detector's speed on this machine"),
}


def run(args: list[str]) -> None:
    """Parse and run `sagan-fast faces ACTION`."""
    if not args or args[0] in ("-h", "--help"):
        print(f"usage: sagan-fast faces {{{','.join(ACTIONS)}}} ...\n")
        print("Find faces with FaceBoxes (Zhang et al. 2017).\n")
        for name, (_, what) in ACTIONS.items():
            print(f"  {name:7} {what}")
        print("\nsagan-fast faces ACTION --help shows its options.")
        if not args:
            raise SystemExit(2)
        return
    if args[0] not in ACTIONS:
        raise InputError(f"unknown action {args[0]!r} of faces{nearest(args[0], ACTIONS)}")
    ACTIONS[args[0]][0](args[1:])
