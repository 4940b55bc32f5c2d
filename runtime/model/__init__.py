"""A bundle as a language model: opening, sessions, chat, scores, embeddings."""
