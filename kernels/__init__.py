"""Kernels of sagan_fast: tensors in, tensors out.

No autograd, no nn.Module, no configuration. Each folder holds one op: `reference.py` (plain PyTorch, the truth in
float64), `forward.py` and `backward.py` (Triton kernels and their launchers). The references, the CPU's attention and
the configs import without Triton; everything else needs it.
"""

import math

LOG2_E = math.log2(math.e)
"""exp(x) = exp2(LOG2_E * x). exp2 is what GPUs have, and it is the faster one on CPUs too."""
