"""What each matrix costs, and which are kept in a higher precision."""
