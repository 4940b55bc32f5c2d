"""float32 bundle -> int8 or int4 bundle."""
