"""Token ids in, logits out: a bundle's graph and its KV cache."""
