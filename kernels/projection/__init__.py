"""1x1 convolutions of the attention block with the 2x2 max-pool of keys and values inside."""
