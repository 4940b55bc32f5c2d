"""The precisions of a bundle's weights, one row each, with the facts that the stages share.

A new precision is a row here, a maker in `export/quantize/`, and the maker's line in `export/pipeline.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Precision:
    """One precision. Distances are relative to the largest logit, KL divergences in nats."""

    name: str  # in the command line and the manifest
    bits: int  # of a weight of most projections
    graph: str  # the all-logits graph, by the name that loaders expect
    transformers_js: str  # its dtype in transformers.js
    golden_limit: float  # maximum distance of another device's logits from the CPU's
    memory_bytes: int  # peak of an export, per weight, in addition to weights of the module in memory
    disk_bytes: int  # peak of an export, per weight
    cache_bytes: int = 4  # per number of the KV cache
    max_difference: float = 1e-5  # of logits from the source's; for a quantized bundle, between its own runs
    # For a quantized one:
    finer: str = "fp32"  # the precision of the most sensitive matrices, and the one to export in instead
    calibration_windows: int = 0  # of calibration text
    max_kl: float = 0.0  # from float32: an export beyond it is not the same model any more
    decode_kl: float = 0.0  # maximum KL of decoding from prefill, as a share of the KL divergence from float32

    @property
    def calibrated(self) -> bool:
        """Whether text decides how weights are rounded."""
        return self.calibration_windows > 0

    @property
    def quantized(self) -> bool:
        """Whether weights are integers: MatMuls use int8 kernels, and the bundle is compared with itself."""
        return self.bits <= 8


# Golden limits: devices were 5e-7 from the CPU in float32 and 2e-3 in float16. A prefill that leaves out keys is at
# least 2e-2 off. A device that does not quantize activations is further off if the CPU runs them in int8: 1.5e-2 in
# SmolLM2-135M.
#
# Differences: torch and onnxruntime in float32 differ by 9e-5 at logits of 44; float16's noise is 2e-3.
#
# Decoding token by token runs through another path of attention than prefill. int8 activations amplify the last bits.
# The limit is twice int8's own error: two roundings of one size are that far apart. Most of int4's error comes from its
# weights, which are the same on every path, so its limit is a tenth of that.
#
# Calibration: int4's Hessian has more numbers than the scales that int8 is calibrated by.
#
# Memory and disk are measured peaks. int8 is made from float32 files, which are written once more with migrated scales.
# int4 holds its matrices until they are written, and X^T X of a segment's activations. onnxruntime computes float16 in
# float32 on the CPU.
_ROWS = (
    Precision(
        "int8", 8, "onnx/model_quantized.onnx", "q8",
        golden_limit=5e-2, memory_bytes=3, disk_bytes=10, calibration_windows=12, max_kl=0.5, decode_kl=2,
    ),
    Precision(
        "int4", 4, "onnx/model_q4.onnx", "q4",
        golden_limit=5e-2, memory_bytes=5, disk_bytes=10, finer="int8", calibration_windows=32, max_kl=1.0,
        decode_kl=0.2,
    ),
    Precision(  # the blocks of a quantized source as they are; only activations are rounded
        "source", 8, "onnx/model_quantized.onnx", "q8",
        golden_limit=5e-2, memory_bytes=3, disk_bytes=10, max_kl=0.5, decode_kl=2,
    ),
    Precision(
        "fp16", 16, "onnx/model_fp16.onnx", "fp16",
        golden_limit=1e-2, memory_bytes=12, disk_bytes=6, cache_bytes=2, max_difference=1e-2,
    ),
    Precision(
        "fp32", 32, "onnx/model.onnx", "fp32",
        golden_limit=1e-3, memory_bytes=2, disk_bytes=4,
    ),
)  # fmt: skip
PRECISIONS: Final = {row.name: row for row in _ROWS}
