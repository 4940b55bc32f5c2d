"""path/to/file.py:factory -> the result of the user's function, class or expression."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from pastkey.errors import InputError, MissingFileError, PastkeyError

from .definitions import Request, definitions, parse_request, run, run_definitions


def call_factory(file: Path, text: str, *, weights_follow: bool = False) -> tuple[nn.Module, tuple[str, ...]]:
    """Returns the module that `text` evaluates to in the file, and sentences about it.

    A script is imported. If its weights come from elsewhere, or for a notebook, only what `text` needs is run. Raises
    MissingFileError, or InputError with the line.
    """
    notebook = file.suffix == ".ipynb"
    made, steps = make(
        file,
        text,
        definitions_only=notebook or weights_follow,
        is_wanted=lambda value: isinstance(value, nn.Module),
        expected="a torch.nn.Module",
    )
    assert isinstance(made, nn.Module)
    if steps:
        return made, (
            f"{file} trained while it was imported ({steps} steps of an optimizer): to export weights of an earlier "
            "training, save its state_dict and give it with --weights FILE, which runs no training",
        )
    if notebook and not weights_follow:
        return made, (
            f"of {file} only what {text} needs was run, and no training: unless that loads weights itself, they are as "
            "they were initialized; give the trained ones with --weights FILE",
        )
    return made, ()


def make(
    file: Path, text: str, *, definitions_only: bool, is_wanted: Callable[[object], bool], expected: str
) -> tuple[Any, int]:
    """Returns the value of `text`, called if it is a factory, and the number of optimizer steps while the file was run.

    Steps in the factory's own call do not count: it may train on purpose.
    """
    if not file.is_file():
        raise MissingFileError(f"no such file: {file}; expected path/to/file.py:factory")
    if not text.strip():
        raise InputError(
            f"{file} names a file without its factory: write {file}:NAME, where NAME() returns {expected}; it defines "
            f"{_defined(file)}"
        )
    request = parse_request(text, file)
    with _at_home(file):
        with _counted_steps() as steps:
            module = _read(file, request, definitions_only)
        value, shown, is_or = _evaluate(file, request, module), request.text, "is"
        if not is_wanted(value) and callable(value):
            _refuse_missing_arguments(file, shown, value)
            shown, is_or = f"{shown}()", "returned"
            value = _run_user_code(file, shown, value)
    if not is_wanted(value):
        parts = list(value) if isinstance(value, tuple) else []
        number = next((number for number, part in enumerate(parts) if is_wanted(part)), None)
        hint = "" if number is None else f": take it out of the tuple, as in  {file}:'{shown}[{number}]'"
        raise InputError(f"{shown} of {file} {is_or} a {type(value).__name__}; {expected} was expected{hint}")
    return value, len(steps)


def _read(file: Path, request: Request, definitions_only: bool) -> ModuleType:
    """Runs the file, or the part of it that the request needs, as a module."""
    name = f"pastkey_source_{file.stem}"
    if not definitions_only:
        module = _import_file(file, name)
        _run_user_code(file, request.text, lambda: run(list(request.given), f"<{request.text}>", module))
        return module
    module = ModuleType(name)
    module.__file__ = str(file)
    sys.modules[name] = module  # dataclasses look up their module there
    _run_user_code(file, request.text, lambda: run_definitions(file, request, module))
    return module


def _import_file(file: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    loader = spec.loader
    assert loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look up their module there
    _run_user_code(file, "importing", lambda: loader.exec_module(module))
    return module


def _evaluate(file: Path, request: Request, module: ModuleType) -> Any:
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
def _at_home(file: Path) -> Iterator[None]:
    """Runs as if the file were the main program: it can import its neighbours, and sys.argv holds only its path."""
    folder, arguments = str(file.resolve().parent), sys.argv
    sys.path.insert(0, folder)
    sys.argv = [str(file)]
    try:
        yield
    finally:
        sys.argv = arguments
        if folder in sys.path:
            sys.path.remove(folder)


@contextlib.contextmanager
def _counted_steps() -> Iterator[list[None]]:
    """Yields a list with one entry for each step of any optimizer."""
    steps: list[None] = []
    handle = register_optimizer_step_post_hook(lambda *_: steps.append(None))
    try:
        yield steps
    finally:
        handle.remove()


def _run_user_code(file: Path, what: str, call: Callable[[], Any]) -> Any:
    """Calls the user's code; its exceptions become a sentence with the line in their file."""
    try:
        return call()
    except PastkeyError:
        raise
    except (Exception, SystemExit) as error:  # a script without `if __name__ == "__main__"` may exit
        frames = traceback.extract_tb(error.__traceback__)
        places = [
            f"{f.filename}:{f.lineno}" for f in frames if f.filename == str(file) or f.filename.startswith(f"{file}[")
        ]
        where = places[-1] if places else str(file)
        raise InputError(f"{what} failed at {where} with {type(error).__name__}: {error}") from error
