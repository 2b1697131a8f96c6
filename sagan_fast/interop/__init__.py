"""Other people's models and checkpoints: acceleration in place, and the maps of names and shapes both ways."""
