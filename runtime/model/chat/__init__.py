"""A conversation: its messages as a prompt, its answers as messages."""
