"""The precisions of a bundle's weights, a row each: what the stages must know of one.

A further one is a row here, a maker in `export/quantize/`, and the maker's line in `export/pipeline.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Precision:
    """One precision. Distances are relative to the largest logit, KL divergences in nats."""

    name: str  # as the command line and the manifest have it
    bits: int  # of a weight of most projections
    graph: str  # the all-logits graph, by the name under which every loader finds it
    transformers_js: str  # what transformers.js calls it, as a dtype
    golden_limit: float  # how far logits on another device may be from the CPU's
    memory_copies: int  # of the float32 weights, that an export of a loaded module needs at its peak
    disk_bytes: int  # per weight, that an export needs at its peak
    cache_bytes: int = 4  # per number of the KV cache
    max_difference: float = 1e-5  # of logits from the source's; of a quantized bundle from those of its own other runs
    # Of a quantized one:
    finer: str = "fp32"  # the precision of matrices that cost too much, and the one to export in instead
    calibration_windows: int = 0  # of calibration text
    max_kl: float = 0.0  # from float32: an export beyond it has lost the model
    decode_kl: float = 0.0  # decoded token by token, from prefill, as a share of the KL divergence from float32

    @property
    def quantized(self) -> bool:
        """Whether weights are integers: MatMuls take int8 kernels, and parity is with the bundle itself."""
        return self.bits <= 8


# Golden limits: in float32 devices were 5e-7 from the CPU, in float16 2e-3; a prefill that leaves out keys is 2e-2 off,
# and more. A device that leaves activations as they are is further off where they are int8 on the CPU: 1.5e-2 in
# SmolLM2-135M.
#
# Differences: torch and onnxruntime in float32 differ by 9e-5 at logits of 44; float16's noise is 2e-3.
#
# Decoding token by token takes another path through attention than prefill; the last bits, amplified by int8
# activations, may cost no more than twice what int8 itself costs: two roundings of one size are that far from each
# other. Most of what int4 costs is its weights', which are the same on every path: a tenth of int8's share.
#
# Calibration: int4's Hessian is more numbers than the scales that int8 is calibrated by.
#
# Memory and disk are measured peaks. int8 is made from float32 files, which are written once more with migrated scales.
# int4 holds X^T X of every activation, and measures each matrix in one graph of float32 and int4.
_ROWS = (
    Precision(
        "int8", 8, "onnx/model_quantized.onnx", "q8",
        golden_limit=5e-2, memory_copies=4, disk_bytes=8, calibration_windows=8, max_kl=0.5, decode_kl=2,
    ),
    Precision(
        "int4", 4, "onnx/model_q4.onnx", "q4",
        golden_limit=5e-2, memory_copies=6, disk_bytes=11, finer="int8", calibration_windows=32, max_kl=1.0,
        decode_kl=0.2,
    ),
    Precision(
        "fp16", 16, "onnx/model_fp16.onnx", "fp16",
        golden_limit=1e-2, memory_copies=4, disk_bytes=6, cache_bytes=2, max_difference=1e-2,
    ),
    Precision(
        "fp32", 32, "onnx/model.onnx", "fp32",
        golden_limit=1e-3, memory_copies=4, disk_bytes=4,
    ),
)  # fmt: skip
PRECISIONS: Final = {row.name: row for row in _ROWS}
