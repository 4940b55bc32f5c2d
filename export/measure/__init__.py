"""Verification of a bundle against its source, and the measures of its error."""
