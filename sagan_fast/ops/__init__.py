"""Differentiable ops: backend choice, autograd, autocast. One file per op, named as its folder in kernels/."""
