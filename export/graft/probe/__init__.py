"""Probes a module by running it: its call, its attention, its cache."""
