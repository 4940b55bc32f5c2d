"""Generations that run at the same time are decoded together."""
