"""int8 from a verified float32 bundle, and how much of it: matrices stay in float32 until a budget of error is met."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from pastkey import names
from pastkey.bundle import Bundle
from pastkey.errors import InputError

from .calibrate import CalibrationText, calibrated, measured
from .files import INLINE_BYTES
from .quantize import quantize
from .sensitivity import Sensitivity, missed, sensitivity

Write = Callable[[ir.Model], tuple[Bundle, int]]
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Quantized:
    """What was written and measured."""

    bundle: Bundle
    weight_bytes: int
    quality: dict[str, Any]  # of the manifest
    sensitivity: Sensitivity | None  # where it was asked for, or needed to meet the budget


def check_budget(max_kl: float | None, precision: str) -> None:
    """Raises InputError for a budget that is none, or of an export that has no error to bound."""
    if max_kl is None:
        return
    if not (math.isfinite(max_kl) and max_kl > 0):
        raise InputError(f"max_kl is {max_kl:g}; it must be a finite number of nats above 0, such as 0.01")
    if precision == "fp32":
        raise InputError("float32 is what --max-kl measures from: leave it out, or export with --precision int8")


def make_int8(
    exact: Bundle, text: CalibrationText, write: Write, say: Progress, *, max_kl: float | None, by_matrix: bool
) -> Quantized:
    """Calibrates, quantizes, writes and measures; with `max_kl`, again and again until the budget is met.

    `exact` is the float32 bundle, beside whose graph files may lie meanwhile. `max_kl` bounds the KL divergence from
    float32 in nats on the windows that nothing is chosen by. One round is enough where int8 keeps within it; two are as
    a rule where it does not. `by_matrix` asks for the table of what each matrix costs. Raises InputError on NaN or
    infinity, and QualityError where the budget is missed with all matrices but one in float32.
    """
    model, table = calibrated(exact, text.chosen_by, say), None
    if max_kl is None and not by_matrix:
        quantize(model)
        return Quantized(*written(exact, model, write, text), None)
    folder = exact.common_graph.parent
    calibrated_graph = folder / "calibrated.onnx"
    data = calibrated_graph.name + names.DATA_SUFFIX
    ir.save(model, calibrated_graph, external_data=data, size_threshold_bytes=INLINE_BYTES)
    del model

    def measure_each() -> Sensitivity:
        say("measure what each matrix costs in int8")
        return sensitivity(ir.load(calibrated_graph), folder, text.measured_on, max_kl)

    if by_matrix:
        table = measure_each()
    keep, step = () if table is None else table.keep, 1
    while True:
        model = ir.load(calibrated_graph)
        quantize(model, keep)
        bundle, weight_bytes, quality = written(exact, model, write, text)
        kl = quality["kl_divergence"]
        if max_kl is None:
            return Quantized(bundle, weight_bytes, quality, table)
        if kl <= max_kl:
            return Quantized(bundle, weight_bytes, quality | {"float32_weights": list(keep)}, table)
        if table is None:
            table = measure_each()
            more = table.keep or table.worst(1)
        else:  # kernels of other shapes round in other ways: a hair over it
            more, step = table.worst(len(keep) + step), 2 * step
        more = more[: table.most_kept]
        if len(more) <= len(keep):
            raise missed(kl, max_kl, "int8", f"with {len(keep)} of {len(table.ranking)} matrices in float32")
        keep = more
        shutil.rmtree(bundle.common_graph.parent)


def written(exact: Bundle, model: ir.Model, write: Write, text: CalibrationText) -> tuple[Bundle, int, dict[str, Any]]:
    """The bundle of a quantized graph, the bytes of its weights, and the manifest's quality."""
    bundle, weight_bytes = write(model)
    return bundle, weight_bytes, measured(exact, bundle, text)
