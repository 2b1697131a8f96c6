"""The whole self-attention block: projection, attention, output projection and residual, and their gradients."""
