"""Constrained decoding: the tokens that a JSON schema, a regular expression, choices or a grammar allow."""
