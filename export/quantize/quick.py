"""int8 and int4 of `--quick`: every weight is rounded to nearest, as it is. No text decides anything.

Nothing is calibrated, so the KL divergence is larger: see docs/export.md.
"""

from __future__ import annotations

import onnx_ir as ir

from pastkey.contract.bundle import Bundle
from pastkey.providers import TARGETS

from ..progress import Progress
from ..settings import ExportConfig
from .calibrate.calibration import CalibrationText, measured
from .int4 import rounded_to_nearest
from .rounding.rewrite import NONE_ROUNDED, quantize
from .search import Quantized, Write


def make_quick(
    fp32: Bundle, text: CalibrationText, write: Write, config: ExportConfig, progress: Progress
) -> Quantized:
    """Quantizes and writes the bundle, and measures it on the held-out text. Raises InputError on NaN or infinity."""
    model = ir.load(fp32.all_logits_graph)
    rounded = NONE_ROUNDED
    progress.stage(f"round to nearest in {config.precision}")
    if config.precision == "int4":
        rounded = rounded_to_nearest(model, progress)
    quantize(model, blocks=rounded, form=TARGETS[config.target].form)
    bundle, weight_bytes = write(model)
    return Quantized(bundle, weight_bytes, measured(fp32, bundle, text, progress), None)
