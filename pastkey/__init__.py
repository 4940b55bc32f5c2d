"""pastkey: train a decoder, export it to ONNX with past key values, shrink it to int8, prove it, run it anywhere.

    text --train--> checkpoint/ --export--> bundle/ --run--> text

This package holds what the stages agree on and imports the standard library only; the stages load on first use.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .lazy import lazy_names

if TYPE_CHECKING:
    from pastkey.runtime import Completion as Completion
    from pastkey.runtime import Generator as Generator
    from pastkey.runtime import LanguageModel as LanguageModel
    from pastkey.runtime import aload as aload
    from pastkey.runtime import load as load

    from . import errors as errors
    from . import export as export
    from . import runtime as runtime
    from . import train as train
    from .version import __version__ as __version__
else:
    __all__, __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "pastkey.runtime": ["Completion", "Generator", "LanguageModel", "aload", "load"],
            ".errors": ["errors"],
            ".export": ["export"],
            ".runtime": ["runtime"],
            ".train": ["train"],
            ".version": ["__version__"],
        },
    )

# An uninstalled checkout keeps the stages beside this folder; an installed package has them inside it.
_here = Path(__file__).resolve().parent
if not (_here / "runtime").is_dir() and (_here.parent / "runtime" / "__init__.py").is_file():
    __path__.append(str(_here.parent))
