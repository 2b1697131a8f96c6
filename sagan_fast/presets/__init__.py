"""Whole recipes, one YAML file each: the networks, and how they are trained."""
