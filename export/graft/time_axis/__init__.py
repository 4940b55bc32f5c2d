"""A decoder as its author wrote it -> one of the contract, by following the time axis of its uncached trace."""
