"""Compatibility: the configurations that other programs read."""
