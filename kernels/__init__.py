"""Triton kernels of sagan_fast: tensors in, tensors out.

No autograd, no nn.Module, no configuration. Each folder holds one op: `reference.py` (plain PyTorch, the truth in
float64), `configs.py` (launch tables), `forward.py` and `backward.py` (kernels and their launchers). The references
import without Triton; everything else needs it.
"""
