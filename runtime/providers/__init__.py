"""Execution providers: which hardware runs a graph, and how onnxruntime opens a session on it."""
