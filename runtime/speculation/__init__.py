"""Draft tokens by another, smaller model: what it drafts for a text, and whether that pays."""
