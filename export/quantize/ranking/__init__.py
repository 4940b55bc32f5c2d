"""The sensitivity of each matrix, and which matrices keep a higher precision."""
