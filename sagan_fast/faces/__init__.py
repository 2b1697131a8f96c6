"""FaceBoxes, a face detector for one processor core. Only the commands that need it import it."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sagan_fast.faces.boxes import anchors
    from sagan_fast.faces.detector import Detector
    from sagan_fast.faces.fused import fuse
    from sagan_fast.faces.network import FaceBoxes

__all__ = ["Detector", "FaceBoxes", "anchors", "fuse"]

_HOMES = {"Detector": "detector", "FaceBoxes": "network", "anchors": "boxes", "fuse": "fused"}


def __getattr__(name: str) -> Any:
    """Import a public name where it is used: the network alone needs neither Pillow nor torchvision."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
