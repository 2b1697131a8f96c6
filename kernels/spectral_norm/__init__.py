"""One power iteration and W/sigma for all spectral-normed weights of a model at once."""
