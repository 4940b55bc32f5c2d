"""Weights that are quantized already: GPTQ, AWQ, compressed-tensors, torchao. Their codes stay as they are."""
