"""checkpoint/ -> bundle/: ONNX with explicit past key values, int8, and the proof that nothing was lost.

    from pastkey.export import export
    export(module_or_path, out="bundle/", precision="int8", context_length=256)

In the order of the data: `source` (what can be exported), `observe` (which attention calls it makes), `rehearse`
(would a cache work?), `graft` (the cache, while torch traces), `simplify` and `passes` (the graph made clean),
`quantize` (int8), `budget` (how much of it), `files` (the bundle), `verify` (parity) and `evaluate` (figures);
`pipeline` is the whole of it, and `attention` is how a call is seen at all. Everything loads on first use: torch and
onnx wait until they are needed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .pipeline import Report as Report
    from .pipeline import export as export

__all__ = ["Report", "export"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        pipeline = importlib.import_module(".pipeline", __name__)
    except ModuleNotFoundError as error:
        from pastkey.errors import missing_extra

        raise missing_extra(error, "export") from None
    return getattr(pipeline, name)
