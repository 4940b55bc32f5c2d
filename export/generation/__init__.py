"""A whole generation as one ONNX graph: the decoder in a Loop, the sampler and its random stream."""
