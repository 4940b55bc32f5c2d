"""Opens what the user has as a Source: a module with its context, tokenizer and configuration."""
