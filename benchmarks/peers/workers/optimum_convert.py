"""optimum's export, and its usual int8 for a processor's kernels: HUGGING_FACE_FOLDER OUT fp32|int8 KERNELS."""

import sys
import tempfile

from optimum.onnxruntime import AutoQuantizationConfig, ORTModelForCausalLM, ORTQuantizer

source, out, precision, kernels = sys.argv[1:]
model = ORTModelForCausalLM.from_pretrained(source, export=True)
if precision == "fp32":
    model.save_pretrained(out)
else:
    with tempfile.TemporaryDirectory() as exported:
        model.save_pretrained(exported)
        quantizer = ORTQuantizer.from_pretrained(exported, file_name="model.onnx")
        # Without VNNI the sums of what is made for it overflow.
        made_for = AutoQuantizationConfig.avx512_vnni if kernels == "avx512_vnni" else AutoQuantizationConfig.avx2
        quantizer.quantize(save_dir=out, quantization_config=made_for(is_static=False, per_channel=True))
