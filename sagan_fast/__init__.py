"""SAGAN's self-attention block and spectral norm as fused kernels and drop-in modules, and a trainer built on them."""

from importlib.util import find_spec

__version__ = "0.1.0"

if find_spec("sagan_fast.kernels") is None:
    raise ImportError(
        "sagan_fast.kernels was not found: the folder kernels/ is mapped into the package when it is installed; "
        "run `pip install -e .` in the repository root"
    )

from sagan_fast import functional
from sagan_fast.interop.accelerate import accelerate
from sagan_fast.layers.explain import explain
from sagan_fast.layers.self_attention import SelfAttention2d
from sagan_fast.layers.spectral_norm import SpectralNormGroup, fuse_spectral_norm, spectral_norm
from sagan_fast.models.discriminator import Discriminator
from sagan_fast.models.generator import Generator

__all__ = [
    "Discriminator",
    "Generator",
    "SelfAttention2d",
    "SpectralNormGroup",
    "accelerate",
    "explain",
    "functional",
    "fuse_spectral_norm",
    "spectral_norm",
]
