"""onnxruntime's IOBinding with the arrays of a run's inputs and results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from ..providers.ort import onnxruntime
from ..providers.placement import CPU

_NOTHING = None, np.empty(0), memoryview(b"")


def new_bindings(onnx: Any, *, two: bool) -> tuple[Binding, Binding]:
    """Bindings for runs in turn, each of which reads the outputs of the one before; the same one twice unless `two`."""
    first = Binding(onnx)
    return first, Binding(onnx) if two else first


class Binding(onnxruntime.IOBinding):  # type: ignore[misc]
    """An onnxruntime.IOBinding that binds an array once per shape: binding costs 10 us, new arrays cost page faults."""

    def __init__(self, onnx: Any) -> None:
        """`onnx` is the onnxruntime.InferenceSession."""
        super().__init__(onnx)
        # On the CPU a bound value shares the array's memory; a provider with its own memory copies it.
        self._keeps = onnx.get_providers()[0] == CPU
        self._fed: dict[
            str, tuple[tuple[int, ...], npt.NDArray[Any], memoryview]
        ] = {}  # a shape, the array, its memory
        self._results: dict[str, npt.NDArray[np.float32]] = {}
        for name, value in getattr(onnx, "constants", {}).items():
            self.bind_ortvalue_input(name, value)

    def feed(
        self,
        name: str,
        value: npt.ArrayLike | Callable[[memoryview], object],
        shape: tuple[int, ...] | None = None,
        dtype: type[np.generic] = np.int64,
    ) -> None:
        """Copies `value` into an input of the next run, or lets it fill the input's memory.

        `shape`: shape of the input, if `value` is a scalar for all of it or has another shape of the same size.
        """
        if shape is None:
            shape = np.shape(value)  # type: ignore[arg-type]
        known, array, memory = self._fed.get(name, _NOTHING)
        new = not self._keeps or known != shape
        if new:
            array = np.empty(shape, dtype)
            memory = array.reshape(-1).data
        if callable(value):
            value(memory)
        elif isinstance(value, int) and len(memory) == 1:
            memory[0] = value  # after a run, numpy is ten times as slow
        else:
            array[...] = value
        if new:
            self.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(array))
            self._fed[name] = shape, array, memory

    def result(self, name: str, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
        """The array for an output of the next run. Reuses the previous run's array if the shape is the same."""
        bound = self._results.get(name)
        if bound is None or bound.shape != shape:
            self._results[name] = bound = np.empty(shape, np.float32)
            self.bind_ortvalue_output(name, onnxruntime.OrtValue.ortvalue_from_numpy(bound))
        return bound

    def clear_binding_outputs(self) -> None:
        """Forgets all outputs."""
        super().clear_binding_outputs()
        self._results.clear()
