"""What the user has -> Source: a module with its context, tokenizer and configuration."""
