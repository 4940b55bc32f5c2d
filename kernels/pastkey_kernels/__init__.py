"""Native kernels for pastkey: where the library of onnxruntime custom operators lies."""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path

__version__ = version("pastkey-kernels")

_NAMES = {"win32": "pastkey_kernels.dll", "darwin": "libpastkey_kernels.dylib"}


def library_path() -> str:
    """The absolute path for `SessionOptions.register_custom_ops_library`."""
    return str(Path(__file__).resolve().parent / _NAMES.get(sys.platform, "libpastkey_kernels.so"))
