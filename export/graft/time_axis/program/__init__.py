"""Traces a module as a program along its time axis."""
