"""Measurements of the kernels, layers and training steps against their peers, and reports on the machine code."""
