"""Exports a decoder to a bundle: ONNX with explicit past key values, in float32, float16, int8 or int4, verified.

    from pastkey.export import export
    export(module_or_path, out="bundle/", precision="int8", context_length=256)

`pipeline` runs the whole export. Each folder may import those listed before it:

    graph/      passes over ONNX graphs
    graft/      a module -> ONNX with a cache: intercepts the attention calls and traces them with a cache
    source/     what the user has -> Source
    measure/    verification, and the error of a bundle
    quantize/   float32 bundle -> int8 or int4 bundle
    compat/     the configurations that other programs read

`settings` holds every option with its default. `bundle_writer` writes and verifies the bundles of an export. All names
load on first use, so that torch and onnx are imported only when needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pastkey.lazy import lazy_names

if TYPE_CHECKING:
    from .pipeline import Report as Report
    from .pipeline import export as export
    from .settings import ExportOptions as ExportOptions
else:
    __all__, __getattr__, __dir__ = lazy_names(
        __name__, {".pipeline": ["Report", "export"], ".settings": ["ExportOptions"]}
    )
