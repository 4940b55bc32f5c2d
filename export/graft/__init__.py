"""Exports a module to ONNX with a KV cache."""
