"""optimum's export, and its usual int8: HUGGING_FACE_FOLDER OUT fp32|int8."""

import sys
import tempfile

from optimum.onnxruntime import AutoQuantizationConfig, ORTModelForCausalLM, ORTQuantizer

source, out, precision = sys.argv[1:]
model = ORTModelForCausalLM.from_pretrained(source, export=True)
if precision == "fp32":
    model.save_pretrained(out)
else:
    with tempfile.TemporaryDirectory() as exported:
        model.save_pretrained(exported)
        quantizer = ORTQuantizer.from_pretrained(exported, file_name="model.onnx")
        how = AutoQuantizationConfig.avx512_vnni(is_static=False, per_channel=True)
        quantizer.quantize(save_dir=out, quantization_config=how)
