"""Compatibility with other programs: the files that they read, and whether they can load a bundle."""
