"""pastkey: train a decoder, export it to ONNX with past key values, shrink it to int8, prove it, run it anywhere.

    text --train--> checkpoint/ --export--> bundle/ --run--> text

This package holds what the stages agree on and imports the standard library only; the stages load on first use.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pastkey.runtime import Completion as Completion
    from pastkey.runtime import LanguageModel as LanguageModel
    from pastkey.runtime import load as load

__all__ = ["Completion", "LanguageModel", "__version__", "load"]

# An uninstalled checkout keeps the stages beside this folder; an installed package has them inside it.
_here = Path(__file__).resolve().parent
if not (_here / "runtime").is_dir() and (_here.parent / "runtime" / "__init__.py").is_file():
    __path__.append(str(_here.parent))


def __getattr__(name: str) -> Any:
    if name in ("load", "Completion", "LanguageModel"):
        from pastkey import runtime

        return getattr(runtime, name)
    if name == "__version__":
        import importlib.metadata  # here, since it takes longer than the rest of this file

        try:
            return importlib.metadata.version("pastkey")
        except importlib.metadata.PackageNotFoundError:
            return "0+uninstalled"
    raise AttributeError(f"module 'pastkey' has no attribute {name!r}")
