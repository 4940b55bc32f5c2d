"""checkpoint/ -> bundle/: ONNX with explicit past key values, int8 or int4, and the proof of what is equal.

    from pastkey.export import export
    export(module_or_path, out="bundle/", precision="int8", context_length=256)

`pipeline` is the whole of it, to be read aloud. It reads as the rooms do, each of which may import those before it:

    graph/      ONNX -> better ONNX, exactly
    graft/      a module -> ONNX with a cache: the attention calls are seen, and torch traces them with a cache
    source/     what the user has -> Source
    measure/    is it right, and how far is it off
    quantize/   float32 bundle -> int8 or int4 bundle
    compat/     other programs: the configurations that they read, and whether they load a bundle

`settings` has every choice with its default, `bundle_writer` writes and proves the bundles of an export. Everything
loads on first use: torch and onnx wait until they are needed.
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
