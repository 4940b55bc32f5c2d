"""ONNX -> better ONNX, exactly: every pass keeps what the graph computes."""
