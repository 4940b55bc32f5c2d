"""The key/value caches, one file per form."""
