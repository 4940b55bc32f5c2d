"""The environment of chat templates: Jinja's immutable sandbox with the extensions that templates use.

Jinja's sandbox keeps a template away from Python's objects. Here its operations are bounded, so that no template takes
all memory or holds the interpreter for long (`'x' * 10**10`): operators, calls of methods, filters, literals and macros
make values of at most MAX_OUTPUT, and operations and loops add up to at most MAX_WORK. Only the child process of
`runtime/sandbox/` bounds the time itself.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from pastkey.errors import missing_extra
from pastkey.values import shown

if TYPE_CHECKING:
    import jinja2

MAX_SOURCE = 200_000  # characters of a template; the longest public ones have about 30,000
MAX_OUTPUT = 4_000_000  # characters of a rendering, about a million tokens; and of a value
MAX_WORK = 1_000_000_000  # of a rendering: the characters and items of all operations, and _STEP for each
_STEP, _ITEM = 250, 8  # characters that an operation, and a value in a list, count for
_MAX_PRODUCT = 250_000_000  # of the sizes of an operation's two largest operands: the most that it makes of them
_MAX_INDENT = 64
_WIDTH = re.compile(r"[%:.)][^\w%{}]*(\d+)")  # of a conversion: %9d, %(name)9d, %.9f, {:>9}
_COMPUTED = re.compile(r"%[^a-zA-Z%]*\*|\{[^{}]*:[^{}]*\{")  # %*d, {:{}}
_MAX_NUMBER = 1_000_000  # as an argument, mostly a width
_ADDING = ("d", "default")  # filters whose result is one of their operands
_QUADRATIC = ("pprint", "striptags", "sum", "urlize")  # filters whose time is that of the square of their operand


def environment() -> jinja2.Environment:
    """The environment. Raises MissingExtraError without jinja2."""
    try:
        import jinja2.ext
        from jinja2 import nodes, parser, utils
    except ModuleNotFoundError as error:
        raise missing_extra(error) from None

    class GenerationBlock(jinja2.ext.Extension):
        """{% generation %} ... {% endgeneration %} marks the assistant's text for training. Renders its body."""

        tags = {"generation"}  # noqa: RUF012 - Jinja's own form

        def parse(self, parser: parser.Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    class Namespace(utils.Namespace):
        """Jinja's, whose text does not hold its values: they may hold it many times."""

        __repr__ = object.__repr__

    made = _bounded_sandbox()(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, jinja2.ext.loopcontrols]
    )
    made.filters["tojson"] = _to_json
    made.filters = {name: _bounded_filter(name, function) for name, function in made.filters.items()}
    made.filters |= {"~": _concatenated, "each": _each, "made": _made, "read": _read}  # see `_bounded_sandbox`
    tests: dict[str, Any] = made.tests
    made.tests = {name: _counted(function) for name, function in tests.items()}
    made.globals |= {"raise_exception": _raise, "strftime_now": _time, "namespace": Namespace}
    del made.globals["lipsum"]
    return made


def _bounded_sandbox() -> type[jinja2.sandbox.SandboxedEnvironment]:
    """Jinja's sandbox, whose operators, calls and joined outputs are bounded. Filters count the other operations."""
    from jinja2 import nodes, runtime, sandbox, visitor

    def filtered(node: Any, name: str, given: Sequence[nodes.Expr] = ()) -> nodes.Filter:
        return nodes.Filter(node, name, [*given], [], None, None, lineno=node.lineno)

    class Filters(visitor.NodeTransformer):
        def generic_visit(self, node: nodes.Node, *args: Any, **named: Any) -> nodes.Node:
            super().generic_visit(node, *args, **named)
            if isinstance(node, nodes.Concat):
                return filtered(node.nodes[0], "~", node.nodes[1:])
            if isinstance(node, nodes.For):
                node.iter = filtered(node.iter, "each")
            elif isinstance(node, nodes.Compare):
                node.expr = filtered(node.expr, "read")
                for operand in node.ops:
                    operand.expr = filtered(operand.expr, "read")
            elif isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice):
                node.node = filtered(node.node, "read")
            elif isinstance(node, nodes.List | nodes.Tuple | nodes.Dict) and node.find(nodes.Name):
                return filtered(node, "made") if getattr(node, "ctx", "load") == "load" else node
            return node

    class Sandbox(sandbox.ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset({"+", "*", "**", "%"})
        concat = staticmethod(lambda pieces: _bounded(_joined, (), pieces))

        def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
            tree: nodes.Template = Filters().visit(super()._parse(source, name, filename))
            tree.set_environment(self)
            return tree

        def call_binop(self, context: runtime.Context, operator: str, left: Any, right: Any) -> Any:
            del context
            numbers = isinstance(left, int | float) and isinstance(right, int | float)
            if numbers and operator == "**" and abs(right) > 64:
                _refuse()
            if operator == "%":
                _require_narrow(left)
            _require_short((left, right))
            operands = () if numbers or operator == "+" else (left, right)
            return _bounded(self.binop_table[operator], operands, left, right)

        def call(self, context: runtime.Context, called: Any, /, *args: Any, **named: Any) -> Any:
            method = getattr(called, "__wrapped__", called)  # Jinja wraps str.format
            owner = getattr(method, "__self__", None)
            given = (*args, *(value for name, value in named.items() if name not in ("_loop_vars", "_block_vars")))
            if isinstance(owner, str | bytes | int):
                if method.__name__.startswith("format"):
                    _require_narrow(owner)
                given = ("" if isinstance(owner, int) else owner, *given)
            else:  # a method without growth, or a macro, whose varargs hold what it is given
                _require_short(given)
                given = ()
                if isinstance(called, runtime.LoopContext):  # the loop again, over other items
                    args = tuple(map(_each, args))
            return _bounded(super().call, given, context, called, *args, **named)

    return Sandbox


def _bounded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    first = int(hasattr(function, "jinja_pass_arg"))  # before it Jinja gives the context or the environment

    @functools.wraps(function)
    def run(*given: Any, **named: Any) -> Any:
        value = "" if isinstance(given[first], int) else given[first]
        if name == "format":
            _require_narrow(value)
        operands = (value, *given[first + 1 :], *named.values(), *([value] if name in _QUADRATIC else ()))
        return _bounded(function, () if name in _ADDING else operands, *given, **named)

    return run


def _counted(test: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(test)
    def run(*given: Any, **named: Any) -> Any:
        _spend(sum(map(_length, given)))
        return test(*given, **named)

    return run


# --- the bounds -------------------------------------------------------------------------------------------------------
class _Work(threading.local):
    left = MAX_WORK


_work = _Work()


def allow(work: int) -> None:
    """Sets what the following operations of this thread may add up to."""
    _work.left = work


def _spend(work: int) -> None:
    _work.left -= _STEP + work
    if _work.left < 0:
        raise ValueError("it takes too many steps")


def _refuse() -> NoReturn:
    raise ValueError(f"it makes a value of more than {MAX_OUTPUT:,} characters, or a number beyond 64 bits")


def _bounded(function: Callable[..., Any], operands: Sequence[Any], /, *given: Any, **named: Any) -> Any:
    """Runs an operation whose result is at most as long as the product of its two largest operands."""
    if len(operands) > 1:
        *_, second, largest = sorted(map(_factor, operands))
        if second * largest > _MAX_PRODUCT:
            _refuse()
    _spend(sum(map(_length, operands)))
    result = function(*given, **named)
    _require_short(result)
    _spend(_length(result))
    return result


def _require_short(value: Any) -> None:
    if _size(value) > MAX_OUTPUT or (isinstance(value, int) and value.bit_length() > 64):
        _refuse()


def _factor(operand: Any) -> int:
    if not isinstance(operand, int):
        return _size(operand)
    if abs(operand) > _MAX_NUMBER:
        _refuse()
    return abs(operand)


def _length(value: Any) -> int:
    return len(value) if isinstance(value, str | bytes | list | tuple | dict | range) else 0


def _size(value: Any) -> int:
    """The characters of a value and of those within it, and _ITEM for each. One within it twice counts twice."""
    total, left = 0, [value]
    while left and total <= MAX_OUTPUT:
        found = left.pop()
        total += len(found) if isinstance(found, str | bytes) else _ITEM
        if isinstance(found, dict):
            left += [*found, *found.values()]
        elif isinstance(found, list | tuple):
            left += found
        elif isinstance(found, range):
            total += _ITEM * len(found)
    return total


def _require_narrow(form: Any) -> None:
    """Refuses a format string with a computed width, or whose widths add up to more than MAX_OUTPUT.

    Each number behind a sign that may begin a width counts, since a form of either kind may have it anywhere.
    """
    if isinstance(form, bytes):
        form = form.decode("latin-1")
    if isinstance(form, str):
        widths = _WIDTH.findall(form)
        if any(len(width) > 7 for width in widths) or sum(map(int, widths)) > MAX_OUTPUT or _COMPUTED.search(form):
            _refuse()


def _joined(texts: Iterable[str]) -> str:
    texts = list(texts)
    if sum(map(len, texts)) > MAX_OUTPUT:
        _refuse()
    return "".join(texts)


def _concatenated(*values: Any) -> str:
    found = _joined(map(str, values))
    _spend(len(found))
    return found


def _made(value: Any) -> Any:
    _require_short(value)
    return _read(value)


def _read(value: Any) -> Any:
    _spend(_length(value))
    return value


def _each(items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        _spend(0)
        yield item


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Replaces Jinja's filter of this name, which escapes HTML."""
    if len(indent) > _MAX_INDENT if isinstance(indent, str) else (indent or 0) > _MAX_INDENT:
        _refuse()
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: Any) -> NoReturn:
    raise ValueError(str(message))


def _time(form: str) -> str:
    _require_narrow(form)
    return datetime.datetime.now().strftime(form)


def plain(value: Any) -> Any:
    """A copy made of JSON's types only, so that a template cannot reach methods of other objects."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    tolist = getattr(value, "tolist", None)  # numpy scalars and arrays
    if callable(tolist):
        return plain(tolist())
    raise TypeError(f"{shown(value)} is a {type(value).__name__}; text, numbers, lists and dicts were expected")
