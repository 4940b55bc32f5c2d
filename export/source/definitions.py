"""Runs only the definitions of a script or notebook that an expression needs.

1. A file is one cell; a notebook has several, without their magics.
2. For each top-level statement, the symbol table lists the names that it makes and those that it reads, including those
   of its functions and classes.
3. Needed are the names of the expression, and those that a statement reads which makes a needed name.
4. The statements that make needed names are run in order: imports, definitions and assignments, also within `if`, `try`
   and `with`. Everything else (loops, calls: a training) is skipped.
"""

from __future__ import annotations
import __future__

import ast
import json
import linecache
import re
import symtable
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from pastkey.errors import InputError, first_line
from pastkey.files.folder import read_text

_SIMPLE = (
    ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef,
    ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Pass, ast.Expr,
)  # fmt: skip
_BLOCKS = (ast.If, ast.Try, ast.With)  # run if they hold only simple statements
# IPython syntax that is not Python: %magic, !command, ?help and help?, also assigned.
_MAGIC = re.compile(r"^(\s*)(?:[%!?].*|[\w ,.]+=\s*[%!].*|[\w.]+\?{1,2}\s*)$")


@dataclass(frozen=True)
class Statement:
    """A statement at the top level."""

    node: ast.stmt
    place: str  # the file; for a notebook with the number of the cell
    makes: frozenset[str]
    reads: frozenset[str]


@dataclass(frozen=True)
class FileExpression:
    """The expression to evaluate in a file, such as `a = 1; Model(a)`: the last part is the result."""

    text: str
    given: tuple[ast.stmt, ...]  # assignments that replace the file's own to these names
    expression: ast.Expression

    @property
    def given_names(self) -> frozenset[str]:
        return frozenset(name for node in self.given for name in _names(node)[0])

    @property
    def reads(self) -> frozenset[str]:
        nodes: list[ast.stmt] = [*self.given, ast.Expr(self.expression.body)]
        return frozenset(name for node in nodes for name in _names(node)[1])


def parse_request(text: str, file: Path) -> FileExpression:
    """Parses a request. Raises InputError if it is not an expression."""
    try:
        *given, last = ast.parse(text.strip()).body
    except (SyntaxError, ValueError) as error:  # ValueError: null characters
        raise InputError(
            f"{text!r}, the name or expression for {file}, is not valid Python ({first_line(error)}): write a name or "
            "expression, such as Model(n_layer=2)"
        ) from None
    if not isinstance(last, ast.Expr) or not all(isinstance(node, ast.Assign | ast.AnnAssign) for node in given):
        raise InputError(
            f"{text!r}, the name or expression for {file}, does not end in an expression, or has more than "
            "assignments before it: write NAME, or such as  n_layer = 2; Model(n_layer)"
        )
    return FileExpression(text.strip(), tuple(given), ast.Expression(last.value))


def run_definitions(file: Path, request: FileExpression, module: ModuleType) -> None:
    """Runs in `module` the parts of the file that the request needs. Raises InputError if that fails."""
    statements = list(_statements(file))
    early = [node for node in request.given if not _names(node)[1]]  # literals, which the file's statements may read
    for node in early:
        run([node], f"<{request.text}>", module)
    needed = _needed(statements, request)
    future = any(_is_future(statement.node) for statement in statements)
    for statement in needed.statements:
        _run(statement, request, needed, module, future)
    for node in request.given:
        if node not in early:
            run([node], f"<{request.text}>", module)


def run(body: list[ast.stmt], place: str, module: ModuleType, future: bool = False) -> None:
    """Runs statements in the module; tracebacks name the file `place`; `future`: annotations are strings."""
    flags = __future__.annotations.compiler_flag if future else 0
    exec(compile(ast.Module(body, []), place, "exec", flags, dont_inherit=True), vars(module))


def definitions(file: Path) -> list[str]:
    """Returns the names of the top-level classes and functions."""
    kinds = (ast.ClassDef, ast.FunctionDef)
    return [statement.node.name for statement in _statements(file) if isinstance(statement.node, kinds)]


def relative_levels(file: Path) -> int:
    """How many folders up the file's relative imports reach: 1 for `from .config import X`, 0 if it has none."""
    nodes = [node for _, text in _cells(file) for node in ast.walk(ast.parse(text))]
    return max((node.level for node in nodes if isinstance(node, ast.ImportFrom)), default=0)


# --- needed statements ----------------------------------------------------------------------------------------------
_DEFINITIONS = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


@dataclass(frozen=True)
class _Needed:
    """The statements to run, in order, and for each needed name the name whose value would make it unnecessary."""

    statements: tuple[Statement, ...]
    instead: dict[str, str]


def _needed(statements: list[Statement], request: FileExpression) -> _Needed:
    given = request.given_names
    instead = {name: name for name in request.reads}  # needed name -> name to give instead
    chosen: list[Statement] = []
    found = True
    while found:
        found = False
        for statement in statements:
            made = statement.makes & instead.keys() - given
            if statement not in chosen and (made or "*" in statement.makes):
                chosen.append(statement)
                found = True
                direct = isinstance(statement.node, _DEFINITIONS)  # definitions cannot be given: keep their names
                for name in statement.reads:
                    instead.setdefault(name, name if direct else instead[min(made)])
    return _Needed(tuple(statement for statement in statements if statement in chosen), instead)


def _run(statement: Statement, request: FileExpression, needed: _Needed, module: ModuleType, future: bool) -> None:
    node = statement.node
    where = f"{statement.place}:{node.lineno}"
    name = min(statement.makes & needed.instead.keys(), default="*")
    given = needed.instead.get(name, name)
    why = f"{request.text} needs {given}" + ("" if name == given else f", and that {name}")
    advice = f"give its value, as in  '{given} = ...; {request.text}'"
    if not _is_simple(node):
        kind = type(node).__name__.lower()
        raise InputError(
            f"{why}, which the {kind} block at {where} makes, and only training runs such a block: {advice}"
        )
    try:
        run([_WithoutCalls().visit(node) if isinstance(node, _BLOCKS) else node], statement.place, module, future)
    except (Exception, SystemExit) as error:
        told = f"{why}, and making it failed at {where} with {type(error).__name__}: {first_line(error)}"
        raise InputError(told if isinstance(node, _DEFINITIONS) else f"{told}; {advice}") from error


class _WithoutCalls(ast.NodeTransformer):
    """Removes a block's lines that are only calls, such as print()."""

    def visit_Expr(self, node: ast.Expr) -> ast.stmt:
        return ast.copy_location(ast.Pass(), node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.ClassDef:
        return node


def _is_simple(node: ast.stmt) -> bool:
    if not isinstance(node, _BLOCKS):
        return isinstance(node, _SIMPLE)
    handlers = [inner for handler in getattr(node, "handlers", []) for inner in handler.body]
    bodies = [*node.body, *getattr(node, "orelse", []), *getattr(node, "finalbody", []), *handlers]
    return all(map(_is_simple, bodies))


def _names(node: ast.stmt) -> tuple[frozenset[str], frozenset[str]]:
    """Returns the names that a statement makes at the top level, and those that it reads there and in its functions."""
    table = symtable.symtable(ast.unparse(node), "", "exec")
    symbols = table.get_symbols()
    makes = {symbol.get_name() for symbol in symbols if symbol.is_assigned() or symbol.is_imported()}
    makes |= {"*"} if isinstance(node, ast.ImportFrom) and node.names[0].name == "*" else set()
    reads = {symbol.get_name() for symbol in symbols if symbol.is_referenced()}
    inner = list(table.get_children())
    while inner:
        child = inner.pop()
        of_class = child.get_type() == "class"  # its `width: int = width` reads the outer name
        reads |= {
            name.get_name() for name in child.get_symbols() if name.is_global() or (of_class and name.is_referenced())
        }
        inner += child.get_children()
    return frozenset(makes), frozenset(reads - makes)


def _is_future(node: ast.stmt) -> bool:
    return isinstance(node, ast.ImportFrom) and node.module == "__future__" and node.names[0].name == "annotations"


# --- the file -------------------------------------------------------------------------------------------------------
def _statements(file: Path) -> Iterator[Statement]:
    for place, text in _cells(file):
        linecache.cache[place] = (len(text), None, text.splitlines(keepends=True), place)  # for tracebacks
        for node in ast.parse(text, place).body:
            yield Statement(node, place, *_names(node))


def _cells(file: Path) -> Iterable[tuple[str, str]]:
    text = read_text(file)
    if file.suffix == ".py":
        try:
            ast.parse(text)
        except SyntaxError as error:
            raise InputError(f"{file}:{error.lineno} is not valid Python: {error.msg}") from None
        return [(str(file), text)]
    try:
        cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
        sources = ["".join(cell["source"]) for cell in cells]
    except (ValueError, TypeError, KeyError):
        raise InputError(f"{file} is not a notebook: JSON with a list of cells was expected") from None
    numbered = [(f"{file}[{number}]", _without_magics(source)) for number, source in enumerate(sources, 1)]
    return [(place, text) for place, text in numbered if _is_python(text)]


def _without_magics(source: str) -> str:
    """Replaces lines that only IPython reads by `pass`. %%magic may be above Python or other code."""
    if _is_python(source):
        return source
    return "\n".join(_MAGIC.sub(r"\1pass", line) for line in source.splitlines())


def _is_python(text: str) -> bool:
    try:
        ast.parse(text)
    except (SyntaxError, ValueError):  # ValueError: null characters
        return False
    return True
