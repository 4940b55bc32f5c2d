"""int8 from a verified float32 bundle. With a KL budget, the most sensitive matrices stay in float32."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from pastkey.contract.bundle import Bundle
from pastkey.providers import TARGETS

from ..progress import Progress
from ..settings import ExportConfig
from .calibrate.calibration import CalibrationText, calibrated
from .ranking.sensitivity import Sensitivity, sensitivity
from .rounding.rewrite import quantize
from .search import Quantized, Write, search


def make_int8(fp32: Bundle, text: CalibrationText, write: Write, config: ExportConfig, progress: Progress) -> Quantized:
    """Calibrates, quantizes, writes and measures; with `max_kl`, until the budget is met.

    Writes temporary files next to the graph of `fp32`. Raises InputError on NaN or infinity, and QualityError if the
    budget is missed with all matrices but one in float32.
    """
    return search(_Int8Mixtures(fp32, text, config, progress), fp32, text, write, config.max_kl, progress)


class _Int8Mixtures:
    """Every matrix in int8, except the most sensitive ones in float32."""

    precision = "int8"

    def __init__(self, fp32: Bundle, text: CalibrationText, config: ExportConfig, progress: Progress) -> None:
        folder = fp32.all_logits_graph.parent
        self._graph = calibrated(fp32, text.calibration_set, folder / "calibrated.onnx", progress)
        self._text, self._max_kl, self._progress = text, config.max_kl, progress
        self._form = TARGETS[config.target].form
        self.sensitivity: Sensitivity | None = None
        self.start = len(self._table().keep) if config.sensitivity is not None else 0

    def model(self, raised: int) -> ir.Model:
        model = ir.load(self._graph)
        quantize(model, self._kept(raised), form=self._form)
        return model

    def quality(self, raised: int) -> dict[str, Any]:
        return {} if self._max_kl is None else {"float32_weights": list(self._kept(raised))}

    def asked_for(self) -> int:
        return len(self._table().keep) or 1

    def most(self) -> int:
        return self._table().most_kept

    def _kept(self, raised: int) -> tuple[str, ...]:
        return self._table().worst(raised) if raised else ()

    def _table(self) -> Sensitivity:
        if self.sensitivity is None:
            self._progress.stage("measure what each matrix costs in int8")
            self.sensitivity = sensitivity(
                ir.load(self._graph), self._graph.parent, self._text.held_out_set, self._max_kl, progress=self._progress
            )
        return self.sensitivity
