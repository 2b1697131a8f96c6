"""nn.Modules: the attention block, spectral norm, conditional batch norm, residual blocks."""
