"""A page on this machine that shows a run, and the same as one file: samples, attention, curves, scores."""
