"""pastkey and other engines on the same weights, each in its own environment: quality, speed, load and memory."""
