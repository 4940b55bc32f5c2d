"""Decode requests: from the token ids of a prompt to new tokens, streamed as text."""
