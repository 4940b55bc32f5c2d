"""From that program to one cached step."""
