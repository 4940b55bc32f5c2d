"""Weights that are quantized already. Those in blocks of integers stay as they are; others are read as float32."""
