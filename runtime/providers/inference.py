"""An onnxruntime session that raises RunFailedError, with one sentence, for any error of a run."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from pastkey.errors import IntegrityError, first_line

from .ort import RunError, onnxruntime


class RunFailedError(IntegrityError, RuntimeError):
    """A graph loads but does not run. onnxruntime checks shapes and ids only at a run."""


class OrtSession(onnxruntime.InferenceSession):  # type: ignore[misc]
    """An onnxruntime.InferenceSession. A run raises RunFailedError with the graph's name.

    Attributes:
        constants: Inputs that are the same in each run with a Binding: name -> onnxruntime.OrtValue.
    """

    constants: Mapping[str, Any] = {}

    def with_constants(self, constants: Mapping[str, Any]) -> OrtSession:
        """The same session, with these inputs."""
        made = copy.copy(self)
        made.constants = constants
        return made

    def run(self, *arguments: Any, **options: Any) -> Any:
        try:
            return super().run(*arguments, **options)
        except RunError as error:
            raise self._failed(error) from error

    def run_with_iobinding(self, iobinding: Any, run_options: Any = None) -> None:
        try:
            super().run_with_iobinding(iobinding, run_options)
        except RunError as error:
            raise self._failed(error) from error

    def _failed(self, error: Exception) -> RunFailedError:
        return RunFailedError(
            f"onnxruntime {onnxruntime.__version__} cannot run {self._model_path} ({first_line(error)}): the graph was "
            "altered, or memory is short; copy the bundle again, or end other programs"
        )
