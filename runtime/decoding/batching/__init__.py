"""Decode concurrent requests in one batch."""
