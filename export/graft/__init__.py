"""A module -> ONNX with a cache."""
