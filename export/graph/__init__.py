"""Passes over ONNX graphs. Optimizations preserve the results exactly."""
