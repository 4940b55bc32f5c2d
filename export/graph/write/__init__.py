"""Graphs to files: the further graphs of a bundle, and the weights once."""
