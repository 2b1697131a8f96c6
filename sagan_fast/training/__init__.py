"""One training run: its configuration, the step, what is saved and logged, and the loop."""
