"""The results of a run must be finite."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from pastkey.contract.bundle import Manifest
from pastkey.errors import NumericsError


def require_finite(
    found: npt.NDArray[np.float32], padding: npt.NDArray[Any] | None, first: int, what: str, manifest: Manifest
) -> None:
    """Raises NumericsError unless all results (B, T, ...) at the positions from `first` on are finite.

    `padding`: (B, T), true where a result does not count; None for all. `what`: their name in the message.
    """
    finite = np.isfinite(found).all(axis=-1)  # (B, T)
    if padding is not None:
        finite |= padding
    if finite.all():
        return
    row, column = np.argwhere(~finite)[0]
    why = "the weights overflow at this precision: export with --precision fp32"
    if manifest.precision == "fp32":
        why = "the source itself computes them: its weights are damaged or too large"
    raise NumericsError(
        f"the {what} at position {first + int(column)} of row {row} are not finite (NaN or infinity): {why}"
    )
