"""The only import of onnxruntime: `from pastkey.runtime.providers.ort import onnxruntime`."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import Any

from pastkey.errors import MissingExtraError, missing_extra
from pastkey.values import parse_version

# From this release onnxruntime uploads telemetry, unless the environment variable is set before its import.
TELEMETRY_SINCE = (1, 29, 0)
_asked_too_late = "onnxruntime" in sys.modules and os.environ.get("ORT_DISABLE_TELEMETRY", "0") in ("", "0")
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

try:
    import onnxruntime as onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as _state
except ModuleNotFoundError as error:
    raise missing_extra(error) from None

# The oldest release that an extra of pyproject.toml allows: onnxruntime-openvino's newest.
OLDEST = (1, 24, 1)

# onnxruntime's exceptions have no common base class. UnicodeDecodeError: a message has names of a damaged graph.
OrtError: tuple[type[Exception], ...] = (
    *(kind for kind in vars(_state).values() if isinstance(kind, type) and issubclass(kind, Exception)),
    UnicodeDecodeError,
)
# The exceptions of a run. With I/O binding it may raise a plain RuntimeError.
RunError: tuple[type[Exception], ...] = (*OrtError, RuntimeError)


def quantization_tools() -> tuple[Any, Any]:
    """onnxruntime's quantization package and its QNN module. They need the package onnx."""
    from onnxruntime import quantization
    from onnxruntime.quantization.execution_providers import qnn

    return quantization, qnn


_redirecting = threading.Lock()  # a second thread would save and restore the first one's redirection


@contextlib.contextmanager
def standard_output_to_error() -> Iterator[None]:
    """Redirects standard output to standard error, since libraries of providers print there.

    One thread at a time.
    """
    with _redirecting:
        try:
            sys.stdout.flush()
            os.fstat(2)
            kept = os.dup(1)
        except (OSError, AttributeError):  # the process lacks one of the two
            yield
            return
        try:
            os.dup2(2, 1)
            yield
        finally:
            with contextlib.suppress(OSError, AttributeError):  # C's buffers
                ctypes.CDLL(None).fflush(None)
            os.dup2(kept, 1)
            os.close(kept)


def wheels() -> list[str]:
    """The installed packages with the module onnxruntime, the one that is imported first."""
    from importlib import metadata  # 20 ms that only an error needs

    found = dict.fromkeys(metadata.packages_distributions().get("onnxruntime", []))
    version = getattr(onnxruntime, "__version__", "")
    return sorted(found, key=lambda wheel: metadata.version(wheel) != version) or ["onnxruntime"]


def openvino_devices() -> tuple[str, ...]:
    """OpenVINO's names of its devices; empty if this onnxruntime lacks OpenVINO."""
    listed = getattr(_state, "get_available_openvino_device_ids", tuple)
    return tuple(listed())


def upgrade_command() -> str:
    """The command that upgrades the installed wheel of onnxruntime."""
    return f"pip install --upgrade {wheels()[0]}"


def require_supported(version: str) -> None:
    """Raises MissingExtraError for a release that cannot run pastkey's graphs."""
    if parse_version(version) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise MissingExtraError(
            f"onnxruntime {version} is older than {oldest}, the oldest release that pastkey supports: "
            f"type  {upgrade_command()}  and try again"
        )


if not hasattr(onnxruntime, "InferenceSession"):
    # Uninstalling one of several onnxruntime wheels removes files that they share.
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
