"""Measurements. Never timed tests: figures are printed with their settings, and ratios come from interleaved runs."""
