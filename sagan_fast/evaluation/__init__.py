"""Samples a trained generator and scores it."""
