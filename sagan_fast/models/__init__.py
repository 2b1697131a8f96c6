"""SAGAN's generator and discriminator, and the configurations that size them."""
