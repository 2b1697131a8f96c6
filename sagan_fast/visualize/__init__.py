"""Pictures: grids and rows of samples, attention maps, animations."""
