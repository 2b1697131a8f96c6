"""What is done with a trained generator: sampling, scores."""
