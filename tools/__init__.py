"""Tools to run manually: `python -m tools.NAME`."""
