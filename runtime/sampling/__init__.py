"""From logits to a token, and drafts of the next ones."""
