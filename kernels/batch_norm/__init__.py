"""Batch norm with one gain and bias a channel, an image or a class, and ReLU, as one op in each direction."""
