"""The rule of each operator for the time axis: rows of the new tokens in, rows of the new tokens out."""
