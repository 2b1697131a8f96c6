"""SAGAN's self-attention block and spectral norm as fused kernels and drop-in modules, and a trainer built on them.

Names are imported when they are first used (PEP 562), so that the command line answers before PyTorch is imported.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from sagan_fast.version import __version__ as __version__

if find_spec("sagan_fast.kernels") is None:
    raise ImportError(
        "sagan_fast.kernels was not found: the folder kernels/ is mapped into the package when it is installed; "
        "run `pip install -e .` in the repository root"
    )

if TYPE_CHECKING:  # the same names as in _HOMES, for type checkers and editors
    from sagan_fast import functional
    from sagan_fast.interop.accelerate import accelerate
    from sagan_fast.layers.explain import explain
    from sagan_fast.layers.self_attention import SelfAttention2d
    from sagan_fast.layers.spectral_norm import SpectralNormGroup, fuse_spectral_norm, spectral_norm
    from sagan_fast.models.discriminator import Discriminator
    from sagan_fast.models.generator import Generator
    from sagan_fast.training.config import TrainConfig
    from sagan_fast.training.loop import train

_HOMES = {
    "Discriminator": "models.discriminator",
    "Generator": "models.generator",
    "SelfAttention2d": "layers.self_attention",
    "SpectralNormGroup": "layers.spectral_norm",
    "TrainConfig": "training.config",
    "accelerate": "interop.accelerate",
    "explain": "layers.explain",
    "fuse_spectral_norm": "layers.spectral_norm",
    "spectral_norm": "layers.spectral_norm",
    "train": "training.loop",
}
_MODULES = ("functional", "interop", "kernels", "layers", "models", "ops")

__all__ = [
    "Discriminator",
    "Generator",
    "SelfAttention2d",
    "SpectralNormGroup",
    "TrainConfig",
    "accelerate",
    "explain",
    "functional",
    "fuse_spectral_norm",
    "spectral_norm",
    "train",
]


if not TYPE_CHECKING:  # or a type checker would take any name for one of ours

    def __getattr__(name: str) -> Any:
        if name in _HOMES:
            value = getattr(import_module(f"sagan_fast.{_HOMES[name]}"), name)
            globals()[name] = value
            return value
        if name in _MODULES:
            return import_module(f"sagan_fast.{name}")
        raise AttributeError(f"module 'sagan_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
