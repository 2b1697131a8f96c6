"""SAGAN's self-attention block and spectral norm as fused kernels and drop-in modules, and a trainer built on them."""

from importlib.util import find_spec

__version__ = "0.1.0"

if find_spec("sagan_fast.kernels") is None:
    raise ImportError(
        "sagan_fast.kernels was not found: the folder kernels/ is mapped into the package when it is installed; "
        "run `pip install -e .` in the repository root"
    )
