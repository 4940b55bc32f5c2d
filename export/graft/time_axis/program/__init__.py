"""A module as a program along its time axis."""
