"""The plain decoder of the contract, with what a test changes of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..decoders import Plain


def plain(methods: dict[str, Callable[..., Any]] | None = None, **arguments: Any) -> Plain:
    """Plain with other methods, in eval mode."""
    made: Plain = type("Decoder", (Plain,), methods or {})(**arguments)
    return made.eval()
