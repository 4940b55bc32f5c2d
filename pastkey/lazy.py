"""Packages whose names load on first use, so that importing one, or a command's --help, is fast."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def lazy_names(
    package: str, homes: Mapping[str, Sequence[str]]
) -> tuple[list[str], Callable[[str], Any], Callable[[], list[str]]]:
    """Returns `__all__`, `__getattr__` and `__dir__` of a package.

    Type checkers read the same names under TYPE_CHECKING; tests/pastkey/test_lazy.py compares the two.

    Args:
        package: Its `__name__`.
        homes: Module -> its names. A name equal to its module's is the module, which any import of it sets.

    Returns:
        The three. `__getattr__` raises MissingExtraError if a package of an extra is missing.
    """
    home = {name: module for module, names in homes.items() for name in names}

    def get(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        try:
            module = importlib.import_module(home[name], package)
        except ModuleNotFoundError as error:
            from .errors import missing_extra

            raise missing_extra(error, package.rpartition(".")[2]) from None
        return module if home[name] == f".{name}" else getattr(module, name)

    def show() -> list[str]:
        return sorted({*home, *(name for name in vars(sys.modules[package]) if name.startswith("__"))})

    return sorted(home), get, show
