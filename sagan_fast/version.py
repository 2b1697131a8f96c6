"""The version of the package, in a file of its own because nothing may be imported to know it."""

__version__ = "0.1.0"
