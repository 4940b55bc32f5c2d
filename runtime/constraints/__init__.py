"""What a text may be: a JSON schema, a regular expression, a choice or a grammar, and the tokens that it allows."""
