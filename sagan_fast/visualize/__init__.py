"""Pictures: grids of samples."""
