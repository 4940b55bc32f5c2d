"""Which hardware runs a graph: providers, and how onnxruntime opens a session on them."""
