"""Tokenizers of every format, as tokenizer.json."""
