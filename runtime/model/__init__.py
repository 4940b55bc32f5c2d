"""Language models: loading, generation, sessions, chat, scores, embeddings."""
