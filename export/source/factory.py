"""path/to/file.py:factory -> the result of the user's function, class or expression.

A file with relative imports is imported as a part of its package.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from pastkey.errors import InputError, MissingFileError, PastkeyError

from .definitions import (
    FileExpression,
    definitions,
    parse_request,
    relative_levels,
    run,
    run_definitions,
)


def call_factory(file: Path, text: str, *, weights_follow: bool = False) -> tuple[nn.Module, tuple[str, ...]]:
    """Returns the module that `text` evaluates to in the file, and sentences about it.

    A script is imported. If its weights come from elsewhere, or for a notebook, only code for `text` is run. Raises
    MissingFileError, or InputError with the line.
    """
    notebook = file.suffix == ".ipynb"
    made = make(
        file,
        text,
        definitions_only=notebook or weights_follow,
        is_wanted=lambda value: isinstance(value, nn.Module),
        expected="a torch.nn.Module",
    )
    assert isinstance(made, nn.Module)
    if notebook and not weights_follow:
        return made, (
            f"of {file} only the parts that {text} needs were run, and no training: unless they load weights, these "
            "are as they were initialized; give the trained ones with --weights FILE",
        )
    return made, ()


def make(file: Path, text: str, *, definitions_only: bool, is_wanted: Callable[[object], bool], expected: str) -> Any:
    """Returns the value of `text`, called if it is a factory."""
    if not file.is_file():
        raise MissingFileError(f"no such file: {file}; expected path/to/file.py:factory")
    if not text.strip():
        raise InputError(
            f"{file} names a file without its factory: write {file}:NAME, where NAME() returns {expected}; it defines "
            f"{_defined(file)}"
        )
    request = parse_request(text, file)
    root, package = _package_of(file)
    with _at_home(file, root, package):
        module = _read(file, request, definitions_only, package)
        value, shown, is_or = _evaluate(file, request, module), request.text, "is"
        if not is_wanted(value) and callable(value):
            _refuse_missing_arguments(file, shown, value)
            shown, is_or = f"{shown}()", "returned"
            value = _run_user_code(file, shown, value)
    if not is_wanted(value):
        parts = list(value) if isinstance(value, tuple) else []
        number = next((number for number, part in enumerate(parts) if is_wanted(part)), None)
        hint = "" if number is None else f": choose it from the tuple, as in  {file}:'{shown}[{number}]'"
        raise InputError(f"{shown} of {file} {is_or} a {type(value).__name__}; {expected} was expected{hint}")
    return value


def _read(file: Path, request: FileExpression, definitions_only: bool, package: str) -> ModuleType:
    """Runs the file, or the part of it that the request needs, as a module."""
    if package:
        _import_package(file, package)
    if not definitions_only:
        module = _import_file(file, package)
        _run_user_code(file, request.text, lambda: run(list(request.given), f"<{request.text}>", module))
        return module
    module = ModuleType(f"pastkey_source_{file.stem}")
    module.__file__, module.__package__ = str(file), package
    sys.modules[module.__name__] = module  # dataclasses look up their module there
    _run_user_code(file, request.text, lambda: run_definitions(file, request, module))
    return module


def _package_of(file: Path) -> tuple[Path, str]:
    """The folder that holds the file's package, and the package if the file imports relatively, else "".

    A package is each folder with __init__.py, and as many as relative imports name.
    """
    folder, parts, levels = file.resolve().parent, list[str](), relative_levels(file)
    while folder.name and "." not in folder.name and (len(parts) < levels or (folder / "__init__.py").is_file()):
        parts.insert(0, folder.name)
        folder = folder.parent
    return folder, ".".join(parts) if levels else ""


def _import_package(file: Path, package: str) -> None:
    module = _run_user_code(file, f"importing the package {package}", lambda: importlib.import_module(package))
    folder = str(file.resolve().parent)
    found = [str(Path(place).resolve()) for place in getattr(module, "__path__", [])]
    if folder not in found:
        raise InputError(
            f"{file} is in a package {package}, and Python already has another one of this name, in "
            f"{', '.join(found) or module.__name__}: rename the folder"
        )


def _import_file(file: Path, package: str) -> ModuleType:
    name = f"{package}.{file.stem}".removesuffix(".__init__") if package else f"pastkey_source_{file.stem}"
    if package and name in sys.modules:  # by the package itself
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    loader = spec.loader
    assert loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look up their module there
    try:
        _run_user_code(file, "importing", lambda: loader.exec_module(module))
    except BaseException:
        sys.modules.pop(name, None)
        raise
    return module


def _evaluate(file: Path, request: FileExpression, module: ModuleType) -> Any:
    wanted = request.expression.body
    if isinstance(wanted, ast.Name) and not hasattr(module, wanted.id):
        raise InputError(f"{file} has no function {wanted.id!r}; it defines {_defined(file)}")
    code = compile(request.expression, f"<{request.text}>", "eval")
    return _run_user_code(file, request.text, lambda: eval(code, vars(module)))


def _defined(file: Path) -> str:
    return ", ".join(name for name in definitions(file) if not name.startswith("_")) or "none"


def _refuse_missing_arguments(file: Path, name: str, factory: Callable[..., Any]) -> None:
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):  # some built-in functions have no signature
        return
    needed = [
        parameter.name
        for parameter in parameters
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    if needed:
        raise InputError(
            f"{name}() of {file} needs {', '.join(needed)}: give {'it' if len(needed) == 1 else 'them'} as in  "
            f"{file}:'{name}({', '.join(f'{argument}=...' for argument in needed)})'"
        )


# --- running the user's code ----------------------------------------------------------------------------------------
@contextlib.contextmanager
def _at_home(file: Path, root: Path, package: str) -> Iterator[None]:
    """Runs as if the file were the main program, in the working folder: sys.argv holds only its path.

    It can import its neighbours, its package, and modules in the working folder. Neither that folder nor torch's
    default dtype stays changed.
    """
    arguments, dtype, own = sys.argv, torch.get_default_dtype(), [str(file.resolve().parent)]
    before = [*([] if package else own), str(root), str(Path.cwd())]
    after = own if package else []  # a part of a package hides no module of its name
    sys.path = [*before, *sys.path, *after]
    sys.argv = [str(file)]
    try:
        with contextlib.chdir(Path.cwd()):
            yield
    finally:
        sys.argv = arguments
        torch.set_default_dtype(dtype)
        for place in (*before, *after):
            if place in sys.path:
                sys.path.remove(place)


def _run_user_code(file: Path, what: str, call: Callable[[], Any]) -> Any:
    """Calls the user's code; its exceptions become a sentence with the line in their file."""
    try:
        return call()
    except PastkeyError:
        raise
    except (Exception, SystemExit) as error:  # a script without `if __name__ == "__main__"` may exit
        told = f"{what} failed at {_place(file, error)} with {type(error).__name__}: {error}"
        if isinstance(error, SystemExit) and what.startswith("importing"):
            told += ', which ends Python: put the code of a program under  if __name__ == "__main__":'
        raise InputError(told) from error


def _place(file: Path, error: BaseException) -> str:
    """file:line of the innermost frame in the user's file, a cell of it, or another file of its folder."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<")]
    own = [f for f in frames if f.filename == str(file) or f.filename.startswith(f"{file}[")]
    beside = [f for f in frames if file.resolve().parent in Path(f.filename).parents]
    found = (own or beside)[-1:]
    return next((f"{frame.filename}:{frame.lineno}" for frame in found), str(file))
