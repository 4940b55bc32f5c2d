"""pastkey: train a decoder, export it to ONNX with past key values, quantize it, verify it, run it anywhere.

    text --train--> checkpoint/ --export--> bundle/ --run--> text

This package has the code that the stages share, and imports only the standard library. The stages load on first use.
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
    from pastkey.runtime import sandbox as sandbox

    from . import errors as errors
    from . import export as export
    from . import runtime as runtime
    from . import train as train
    from .version import __version__ as __version__
else:
    __all__, __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "pastkey.runtime": ["Completion", "Generator", "LanguageModel", "aload", "load", "sandbox"],
            ".errors": ["errors"],
            ".export": ["export"],
            ".runtime": ["runtime"],
            ".train": ["train"],
            ".version": ["__version__"],
        },
    )

# In a checkout that is not installed, the stages are next to this folder; in an installed package, inside it.
_here = Path(__file__).resolve().parent
if not (_here / "runtime").is_dir() and (_here.parent / "runtime" / "__init__.py").is_file():
    __path__.append(str(_here.parent))
