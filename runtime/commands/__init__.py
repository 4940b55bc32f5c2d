"""What the commands do beyond the library."""
