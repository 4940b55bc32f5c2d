"""onnxruntime itself, imported in this one place: `from pastkey.runtime.ort import onnxruntime`."""

from __future__ import annotations

import os
import re

from pastkey.errors import MissingExtraError, missing_extra

# onnxruntime 1.29 and later upload telemetry unless this is in the environment before the library initialises.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

try:
    import onnxruntime as onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as _state
except ModuleNotFoundError as error:
    raise missing_extra(error) from None

OLDEST = (1, 23, 0)  # the oldest release that the tests run
BROKEN = {(1, 24, 1): "refuses weight files that are links, as download caches keep them"}

# What onnxruntime raises has no common base class of its own.
OrtError: tuple[type[Exception], ...] = tuple(
    kind for kind in vars(_state).values() if isinstance(kind, type) and issubclass(kind, Exception)
)
# What a run may raise: by bindings, a plain RuntimeError.
RunError: tuple[type[Exception], ...] = (*OrtError, RuntimeError)


def parse_version(text: str) -> tuple[int, int, int]:
    """The three numbers that a version starts with: "1.32.0.dev3" -> (1, 32, 0)."""
    numbers = [int(number) for number in re.findall(r"\d+", text)[:3]]
    major, minor, patch = (*numbers, 0, 0, 0)[:3]
    return major, minor, patch


def require_supported(version: str) -> None:
    """Raises MissingExtraError for a release that cannot run what pastkey exports."""
    found = parse_version(version)
    reason = BROKEN.get(found)
    if found < OLDEST:
        reason = f"is older than {'.'.join(map(str, OLDEST))}, the first release that runs pastkey's int8 graphs"
    if reason:
        raise MissingExtraError(
            f"onnxruntime {version} {reason}: type  pip install --upgrade 'pastkey[cpu]'  and try again"
        )


if not hasattr(onnxruntime, "InferenceSession"):
    # Uninstalling one of several onnxruntime wheels takes the files that the others share.
    raise MissingExtraError(
        "the package 'onnxruntime' is damaged (two of its wheels were installed over one another): type  "
        "pip uninstall onnxruntime onnxruntime-gpu  and then  pip install 'pastkey[cpu]'"
    )
require_supported(onnxruntime.__version__)
