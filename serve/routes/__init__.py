"""The answers of each route."""
