"""What each operator does to the time axis: rows of the new tokens in, rows of the new tokens out."""
