"""onnxruntime itself, imported in this one place: `from pastkey.runtime.providers.ort import onnxruntime`."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import os
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import Any

from pastkey.errors import MissingExtraError, missing_extra
from pastkey.values import parse_version

# onnxruntime uploads telemetry from this release on, unless the variable is in the environment before it initialises.
TELEMETRY_SINCE = (1, 29, 0)
_asked_too_late = "onnxruntime" in sys.modules and os.environ.get("ORT_DISABLE_TELEMETRY", "0") in ("", "0")
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

try:
    import onnxruntime as onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as _state
except ModuleNotFoundError as error:
    raise missing_extra(error) from None

# The oldest release that bundles of one's own were run on, once. CI runs the floor of pyproject.toml, which is newer.
OLDEST = (1, 23, 0)
# Releases that refuse weights files that are links, as download caches keep them: they are handed over in memory.
REFUSE_LINKS = {(1, 24, 1)}

# What onnxruntime raises has no common base class of its own.
OrtError: tuple[type[Exception], ...] = tuple(
    kind for kind in vars(_state).values() if isinstance(kind, type) and issubclass(kind, Exception)
)
# What a run may raise: by bindings, a plain RuntimeError.
RunError: tuple[type[Exception], ...] = (*OrtError, RuntimeError)


def quantization_tools() -> tuple[Any, Any]:
    """onnxruntime's own package for quantizing, and its part for QNN. They need the package onnx."""
    from onnxruntime import quantization
    from onnxruntime.quantization.execution_providers import qnn

    return quantization, qnn


_redirecting = threading.Lock()  # a second thread would keep, and put back, what the first one has put there


@contextlib.contextmanager
def standard_output_to_error() -> Iterator[None]:
    """While open, what the libraries of a provider print on standard output goes to standard error.

    One thread does so at a time.
    """
    with _redirecting:
        try:
            sys.stdout.flush()
            os.fstat(2)
            kept = os.dup(1)
        except (OSError, AttributeError):  # a process without one of them
            yield
            return
        try:
            os.dup2(2, 1)
            yield
        finally:
            with contextlib.suppress(OSError, AttributeError):  # what C has in its buffers
                ctypes.CDLL(None).fflush(None)
            os.dup2(kept, 1)
            os.close(kept)


def wheels() -> list[str]:
    """The installed packages that bring the module onnxruntime, the one that answers first."""
    found = dict.fromkeys(importlib.metadata.packages_distributions().get("onnxruntime", []))
    version = getattr(onnxruntime, "__version__", "")
    return sorted(found, key=lambda wheel: importlib.metadata.version(wheel) != version) or ["onnxruntime"]


def openvino_devices() -> tuple[str, ...]:
    """The devices that OpenVINO finds, by its names; none where this onnxruntime is without it."""
    listed = getattr(_state, "get_available_openvino_device_ids", tuple)
    return tuple(listed())


def upgrade_command() -> str:
    """What brings a newer release of the onnxruntime that is installed, whichever of its wheels that is."""
    return f"pip install --upgrade {wheels()[0]}"


def require_supported(version: str) -> None:
    """Raises MissingExtraError for a release that cannot run what pastkey exports."""
    if parse_version(version) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise MissingExtraError(
            f"onnxruntime {version} is older than {oldest}, the first release that runs pastkey's int8 graphs: "
            f"type  {upgrade_command()}  and try again"
        )


if not hasattr(onnxruntime, "InferenceSession"):
    # Uninstalling one of several onnxruntime wheels takes the files that the others share.
    raise MissingExtraError(
        "the package 'onnxruntime' is damaged (two of its wheels were installed over one another): type  "
        f"pip uninstall {' '.join(wheels())}  and then  pip install {wheels()[0]}"
    )
require_supported(onnxruntime.__version__)
if _asked_too_late and parse_version(onnxruntime.__version__) >= TELEMETRY_SINCE:
    warnings.warn(
        f"onnxruntime {onnxruntime.__version__} was imported before pastkey could turn its telemetry off: set "
        "ORT_DISABLE_TELEMETRY=1 in the environment before that import",
        RuntimeWarning,
        stacklevel=2,
    )
