"""Folders and files: read with limits, written whole, locked, hashed."""
