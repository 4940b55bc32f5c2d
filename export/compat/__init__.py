"""Other programs that load a bundle: what they read, and whether they can."""
