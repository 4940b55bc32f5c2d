"""Graphs of fixed sizes, for NPUs."""
