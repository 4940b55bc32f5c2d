"""Opens the user's model as a Source: a module with its context, tokenizer and configuration."""
