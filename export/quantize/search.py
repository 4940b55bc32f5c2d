"""The search for a quantized bundle within a KL budget.

A mixture of precisions is written and measured. While it exceeds the budget, more matrices get more bits.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import onnx_ir as ir

from pastkey.contract.bundle import Bundle

from ..progress import SILENT, Progress
from .calibrate.calibration import CalibrationText, measured
from .ranking.sensitivity import Sensitivity, missed

# Writes a quantized graph as a bundle. Returns it with the bytes of its weights.
Write = Callable[[ir.Model], tuple[Bundle, int]]


@dataclass(frozen=True)
class Quantized:
    """A quantized bundle, written and measured."""

    bundle: Bundle
    weight_bytes: int
    quality: dict[str, Any]  # for the manifest
    sensitivity: Sensitivity | None  # if the user or the budget required it


class Mixtures(Protocol):
    """The graphs of one model in one precision, by the number of matrices that get more bits."""

    precision: str
    start: int  # how many always get more bits

    @property
    def sensitivity(self) -> Sensitivity | None:
        """The table, once it is measured."""
        ...

    def model(self, raised: int) -> ir.Model:
        """Returns the graph in which the first `raised` of the ranking have more bits."""
        ...

    def quality(self, raised: int) -> dict[str, Any]:
        """Returns the manifest's entry for these matrices."""
        ...

    def asked_for(self) -> int:
        """Returns how many the sensitivity table requires to meet the budget. Measures the table first if needed."""
        ...

    def most(self) -> int:
        """Returns the largest number that may get more bits."""
        ...


def search(
    mixtures: Mixtures,
    fp32: Bundle,
    text: CalibrationText,
    write: Write,
    max_kl: float | None,
    progress: Progress = SILENT,
) -> Quantized:
    """Writes and measures one mixture after another until the KL divergence from float32 is at most `max_kl` nats.

    The divergence is measured on held-out windows. One round usually suffices. If it misses the budget, the table says
    how many matrices must get more bits. Raises QualityError if the budget is missed with all of them, and InputError
    on NaN or infinity.
    """
    raised, step = mixtures.start, 1
    while True:
        bundle, weight_bytes = write(mixtures.model(raised))
        quality = measured(fp32, bundle, text, progress)
        if max_kl is None or quality["kl_divergence"] <= max_kl:
            return Quantized(bundle, weight_bytes, quality | mixtures.quality(raised), mixtures.sensitivity)
        asked = mixtures.asked_for()
        if raised >= mixtures.most():
            ranked = 0 if mixtures.sensitivity is None else len(mixtures.sensitivity.ranking)
            raise missed(quality["kl_divergence"], max_kl, mixtures.precision, raised, ranked)
        if asked > raised:
            raised = asked
        else:  # kernels of other shapes round differently, so the divergence may exceed the table's
            raised, step = raised + step, 2 * step
        raised = min(raised, mixtures.most())
        shutil.rmtree(bundle.all_logits_graph.parent)
