"""What a run is bound to: onnxruntime's IOBinding, with the arrays of its inputs."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..providers.ort import onnxruntime
from ..providers.placement import CPU


class Binding(onnxruntime.IOBinding):  # type: ignore[misc]
    """An onnxruntime.IOBinding. Binding a value takes 10 us, so that an input which keeps its shape is bound once."""

    def __init__(self, onnx: Any) -> None:
        """`onnx` is the onnxruntime.InferenceSession."""
        super().__init__(onnx)
        # A bound value is its array on the processor; a provider with memory of its own is given a copy.
        self._keeps = onnx.get_providers()[0] == CPU
        self._fed: dict[str, npt.NDArray[Any]] = {}

    def feed(self, name: str, array: npt.NDArray[Any]) -> None:
        """Gives the next run an input: what `array` holds now, whatever becomes of it."""
        bound = self._fed.get(name)
        if not self._keeps or bound is None or bound.shape != array.shape:
            self._fed[name] = bound = np.array(array, order="C")
            self.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(bound))
        else:
            bound[...] = array
