"""Tokens to text and back, and conversations as one text."""
