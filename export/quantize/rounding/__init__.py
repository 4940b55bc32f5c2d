"""Rounds weights to blocks of integers, and rewrites the graph to multiply by them."""
