"""Token ids in, logits out: an opened graph and its cache."""
