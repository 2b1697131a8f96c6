"""Finds faces in pictures: from pixels or a file to boxes and scores."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sagan_fast.choices import FacePrecision, check_choice
from sagan_fast.errors import InputError
from sagan_fast.faces.boxes import anchors, decode, nms
from sagan_fast.faces.fused import for_rgb
from sagan_fast.faces.network import FaceBoxes
from sagan_fast.faces.onnx import codes_of_onnx
from sagan_fast.faces.pictures import Pixels, as_input, as_pixels, read_picture
from sagan_fast.files import file_sha256

OVERLAP = 0.3
"""Of two boxes that overlap by more than this, intersection over union, the better one remains."""
MOST_CANDIDATES, MOST_FACES = 5000, 750
"""Of the published test: what goes into the suppression, and what comes out of it at most."""


class Detector:
    """Maps a picture to the boxes of its faces.

    Args:
        weights: file of weights, as published or from `faces train`, or an ONNX file of `faces export`, which
            ONNX Runtime runs; or a FaceBoxes network.
        min_score: probability that a box must exceed.
        max_side: larger pictures are shrunk to this many pixels at their longer side, with antialiasing.
        enlarge: factor of the picture's size before that. Faces under about 20 pixels need 2 to 3.
        precision: fp32 or bf16, of the network.
        compile: compile the network for each size of picture with torch.compile.
        device: where the network runs.

    Raises InputError for an unknown precision, numbers out of range, and weights that cannot be read.
    """

    def __init__(
        self,
        weights: str | os.PathLike[str] | FaceBoxes,
        *,
        min_score: float = 0.5,
        max_side: int | None = None,
        enlarge: float = 1.0,
        precision: FacePrecision = "fp32",
        compile: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        check_choice("precision", precision, FacePrecision)
        if not 0 < min_score < 1:
            raise InputError(f"min_score must be between 0 and 1, got {min_score}")
        if max_side is not None and max_side < 1:
            raise InputError(f"max_side must be at least 1, got {max_side}")
        if not 0 < enlarge <= 16:
            raise InputError(f"enlarge must be above 0 and at most 16, got {enlarge}")
        self.min_score, self.max_side, self.enlarge = min_score, max_side, enlarge
        self.device = torch.device(device)
        self.sha256 = None if isinstance(weights, FaceBoxes) else _sha256(weights)
        if isinstance(weights, FaceBoxes) or Path(weights).suffix.lower() != ".onnx":
            net = weights if isinstance(weights, FaceBoxes) else FaceBoxes().load_weights(weights)
            self._codes = _codes(net, precision, compile, self.device)
        else:
            if precision != "fp32" or compile or self.device.type != "cpu":
                raise InputError("an ONNX file has its own precision and is not compiled: leave these options out")
            self._codes = codes_of_onnx(Path(weights))
        self._logit = float(torch.tensor(min_score, dtype=torch.float64).logit())

    def __call__(self, image: Pixels | Tensor | str | os.PathLike[str]) -> tuple[Tensor, Tensor]:
        """Return boxes (K, 4), x1 y1 x2 y2 in pixels of `image`, and scores (K,), the best first; both float32, on CPU.

        `image` is uint8 RGB (H, W, 3), or a file, which is turned upright by its EXIF orientation. Gray (H, W) and
        RGBA (H, W, 4) are taken too. A box may reach over the border where a face does. Without a face K is 0.

        Raises InputError for anything that is not a picture.
        """
        whole = read_picture(image) if isinstance(image, (str, os.PathLike)) else as_pixels(image)
        pixels = self._resized(whole)
        height, width = pixels.shape[:2]
        with torch.no_grad():
            codes = self._codes(as_input(pixels).to(self.device))[0]
            boxes, scores = self._found(codes, height, width)
        if pixels is not whole:
            boxes *= boxes.new_tensor([whole.shape[1] / width, whole.shape[0] / height] * 2)
        return boxes, scores

    def _resized(self, pixels: Pixels) -> Pixels:
        height, width = pixels.shape[:2]
        scale = self.enlarge
        if self.max_side is not None:
            scale = min(scale, self.max_side / max(height, width))
        if scale == 1:
            return pixels
        size = max(1, round(width * scale)), max(1, round(height * scale))
        return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR))

    def _found(self, codes: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Return the boxes and scores that `codes` (A, 5) stand for, in pixels of the network's input."""
        values = codes.cpu().numpy()  # NumPy starts faster than PyTorch, and most pictures have few candidates
        kept = np.flatnonzero(values[:, 4] > self._logit)
        if len(kept) > MOST_CANDIDATES:
            kept = kept[np.argpartition(-values[kept, 4], MOST_CANDIDATES)[:MOST_CANDIDATES]]
        chosen = torch.from_numpy(values[kept])
        boxes, logits = decode(chosen[:, :4], torch.from_numpy(anchors(height, width).numpy()[kept])), chosen[:, 4]
        order = nms(boxes, logits, OVERLAP)[:MOST_FACES]
        return boxes[order], logits[order].sigmoid()


def _codes(net: FaceBoxes, precision: FacePrecision, compile: bool, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Return the function from `as_input` (1, 3, H, W) to codes (1, A, 5) in float32."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    fused = for_rgb(net).to(device, dtype)
    run = torch.compile(fused.codes, dynamic=False) if compile else fused.codes
    return lambda x: run(x.to(dtype)).float()


def _sha256(weights: str | os.PathLike[str]) -> str | None:
    path = Path(weights).expanduser()
    return file_sha256(path) if path.is_file() else None
