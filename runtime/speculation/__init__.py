"""Speculative decoding: draft tokens from prompt lookup or a smaller model, and how many."""
