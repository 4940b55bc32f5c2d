"""llama.cpp's own quantization: GGUF_IN GGUF_OUT Q8_0|Q4_0|Q4_K_M."""

import ctypes
import os
import sys

import llama_cpp

source, out, precision = sys.argv[1:]
parameters = llama_cpp.llama_model_quantize_default_params()
parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{precision}")
parameters.allow_requantize = True  # the source may be quantized already; every engine starts from the same
parameters.nthread = os.cpu_count() or 1
if llama_cpp.llama_model_quantize(source.encode(), out.encode(), ctypes.byref(parameters)) != 0:
    sys.exit(f"llama.cpp cannot quantize {source}")
