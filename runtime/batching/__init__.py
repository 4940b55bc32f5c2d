"""Where the rows of several generations meet: who runs a step, for whom, and which caches stay."""
