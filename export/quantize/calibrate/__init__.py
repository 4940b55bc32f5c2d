"""Calibration: prepares weights for quantization by the activations on a text."""
