"""Quantization: float32 bundle -> quantized bundle."""
