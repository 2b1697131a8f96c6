"""What the kernels cost: modelled from their machine code on any machine, measured on a GPU."""
