"""The tokenizer, chat templates, tools and stop strings."""
