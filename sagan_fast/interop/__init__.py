"""Other people's models and checkpoints: acceleration in place, and the maps of names and shapes both ways."""

from sagan_fast.interop.checkpoints import import_discriminator, import_generator

__all__ = ["import_discriminator", "import_generator"]
