"""Ids to ids: a generation, its steps, and the text as it comes."""
