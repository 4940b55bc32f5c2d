"""Writes the graphs of a bundle and the one weights file that they share."""
