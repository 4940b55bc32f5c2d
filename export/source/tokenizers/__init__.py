"""Converts tokenizers of every format to tokenizer.json."""
