"""onnxruntime's session, whose runs end in a sentence: the one place for what onnxruntime raises there."""

from __future__ import annotations

from typing import Any

from pastkey.errors import IntegrityError, first_line

from .ort import RunError, onnxruntime

# The last where names of a damaged graph, which stand in a message, are no text.
_FAILED: tuple[type[Exception], ...] = (*RunError, UnicodeDecodeError)


class RunFailedError(IntegrityError, RuntimeError):
    """A graph that was loaded and cannot be run: its checks of shapes and ids come after the load."""


class Session(onnxruntime.InferenceSession):  # type: ignore[misc]
    """An onnxruntime.InferenceSession. A run raises RunFailedError with the graph's name."""

    def run(self, *arguments: Any, **options: Any) -> Any:
        try:
            return super().run(*arguments, **options)
        except _FAILED as error:
            raise self._failed(error) from error

    def run_with_iobinding(self, *arguments: Any, **options: Any) -> None:
        try:
            super().run_with_iobinding(*arguments, **options)
        except _FAILED as error:
            raise self._failed(error) from error

    def _failed(self, error: Exception) -> RunFailedError:
        return RunFailedError(
            f"onnxruntime {onnxruntime.__version__} cannot run {self._model_path} ({first_line(error)}): the graph was "
            "altered, or memory is short; copy the bundle again, or end other programs"
        )
