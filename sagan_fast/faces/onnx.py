"""FaceBoxes as an ONNX file, in float32 or int8, and such a file run by ONNX Runtime."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sagan_fast.errors import InputError
from sagan_fast.faces.for_runtime import RuntimeFaceBoxes
from sagan_fast.faces.network import FaceBoxes
from sagan_fast.faces.pictures import Pixels, as_input
from sagan_fast.files import explained, reason, written
from sagan_fast.models.export import quiet

INPUT, OUTPUT = "pixels", "codes"


def export_onnx(net: FaceBoxes, path: Path, calibration: Iterable[Pixels] = ()) -> None:
    """Write the fused network to the ONNX file `path`: pixels (1, H, W, 3) to codes (1, A, 5), both float32.

    The pixels are red, green, blue minus the mean, as `as_input` has them in memory. H and W are free. With
    `calibration`, RGB pictures of about the size to come, weights and activations are int8, their ranges those that
    occur in these pictures; heads and depthwise convolutions stay in float32. Raises InputError if a package is missing
    or the file cannot be written.
    """
    _needed("onnx", "onnxscript")
    example = torch.zeros(1, 160, 224, 3)
    model = RuntimeFaceBoxes(net)
    free = {1: torch.export.Dim("height", min=8), 2: torch.export.Dim("width", min=8)}
    with quiet():
        program = torch.onnx.export(
            model, (example,), input_names=[INPUT], output_names=[OUTPUT], dynamic_shapes=({**free},), dynamo=True,
            verbose=False,
        )  # fmt: skip
    assert program is not None
    buffer = io.BytesIO()
    save: Any = program.save  # its annotation leaves out what it says it takes
    save(buffer)
    content = buffer.getvalue()
    pictures = list(calibration)
    if pictures:
        content = _quantised(content, pictures)
    with written(path) as file:
        file.write(content)


def codes_of_onnx(path: Path) -> Callable[[Tensor], Tensor]:
    """Return the function from `as_input` (1, 3, H, W) to codes (1, A, 5) that the ONNX file `path` holds.

    It runs on as many threads as PyTorch has now. Raises InputError for a missing file and for any other network.
    """
    runtime: Any = _needed("onnxruntime")
    if not path.is_file():
        raise InputError(f"there is no ONNX file {path}: sagan-fast faces export writes one")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    with explained(f"{path} cannot be run by ONNX Runtime", kinds=(Exception,)):
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    if [i.name for i in session.get_inputs()] != [INPUT] or [o.name for o in session.get_outputs()] != [OUTPUT]:
        raise InputError(f"{path} is not a file of this version of sagan-fast faces export: write it again")

    def run(x: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {INPUT: _rows(x)})[0])

    return run


def _rows(x: Tensor) -> np.ndarray[Any, Any]:
    """Return `x` (1, 3, H, W) as (1, H, W, 3): the memory of `as_input` as it is."""
    rows: np.ndarray[Any, Any] = x.permute(0, 2, 3, 1).contiguous().numpy()
    return rows


def _quantised(content: bytes, pictures: list[Pixels]) -> bytes:
    """Return the model `content` with int8 convolutions (ONNX Runtime's static QDQ), but for heads and depthwise."""
    import tempfile

    quantization: Any = _needed("onnxruntime.quantization")
    onnx: Any = _needed("onnx")
    convolutions = [node for node in onnx.load_from_string(content).graph.node if node.op_type == "Conv"]
    depthwise = [n.name for n in convolutions if any(a.name == "group" and a.i > 1 for a in n.attribute)]
    heads = [node.name for node in convolutions[-3:]]
    inputs = ({INPUT: _rows(as_input(pixels))} for pixels in pictures)

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        def get_next(self) -> dict[str, np.ndarray[Any, Any]] | None:
            return next(inputs, None)

    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "float.onnx"), Path(folder, "int8.onnx")
        source.write_bytes(content)
        with quiet():
            quantization.quantize_static(
                str(source), str(target), Reader(), quant_format=quantization.QuantFormat.QDQ, per_channel=True,
                op_types_to_quantize=["Conv"], nodes_to_exclude=heads + depthwise,
            )  # fmt: skip
        return target.read_bytes()


def _needed(*modules: str) -> Any:
    """Return the last of `modules`; InputError that says what to install if one is missing."""
    try:
        return [import_module(name) for name in modules][-1]
    except ImportError as error:
        raise InputError(f'ONNX needs `pip install "sagan_fast[export]"`: {reason(error)}') from error


def calibration_pictures(pictures: Iterable[Pixels], most: int, side: int = 640) -> Iterator[Pixels]:
    """Yield the first `most` of `pictures`, shrunk to `side` pixels at their longer side."""
    from PIL import Image

    for _, pixels in zip(range(most), pictures, strict=False):
        image = Image.fromarray(pixels)
        image.thumbnail((side, side), Image.Resampling.BILINEAR)
        yield np.asarray(image)
