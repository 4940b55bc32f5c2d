"""float32 bundle -> quantized bundle."""
