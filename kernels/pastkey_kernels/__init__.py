"""Native kernels for pastkey: where the library of onnxruntime custom operators lies."""

from __future__ import annotations

import sys
from pathlib import Path

__version__ = "0.1.0"  # pastkey's own; pyproject.toml reads it here, since to ask Python for it takes 20 ms

_NAMES = {"win32": "pastkey_kernels.dll", "darwin": "libpastkey_kernels.dylib"}


def library_path() -> str:
    """The absolute path for `SessionOptions.register_custom_ops_library`."""
    return str(Path(__file__).resolve().parent / _NAMES.get(sys.platform, "libpastkey_kernels.so"))
