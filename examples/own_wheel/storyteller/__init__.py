"""Tells stories by the model that stands in this package."""

from __future__ import annotations

import functools
import sys
from importlib.resources import files

import pastkey
from pastkey.runtime import LanguageModel


@functools.cache
def model() -> LanguageModel:
    """Loaded once, with the first story."""
    return pastkey.load(str(files(__name__) / "bundle"))


def main() -> None:
    for chunk in model().stream(" ".join(sys.argv[1:]), max_new_tokens=60, temperature=0.7, seed=1):
        print(chunk.text, end="", flush=True)
    print()
