"""Is it right, and how far is it off."""
