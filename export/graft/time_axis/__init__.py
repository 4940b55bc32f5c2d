"""Turns a user's decoder into a module of the contract by following the time axis of its uncached trace."""
