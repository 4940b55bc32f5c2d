"""ONNX folders, which another program exported: the only place that recognises attention in a graph."""
