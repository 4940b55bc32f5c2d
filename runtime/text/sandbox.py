"""The environment that chat templates run in: Jinja's immutable sandbox, with an end to what a template may spend.

Jinja's sandbox keeps a template away from Python; it does not keep it from looping or from making a text of gigabytes.
Here everything that takes time or memory is charged to a `Budget`: each turn of a loop, each call, filter and operator,
each text and container that they make, and what is written. The syntax tree is changed for it before it is compiled:
what Jinja compiles to plain Python (loops, `~`, literals, slices, comparisons, output) goes through filters of ours.
Where a result can be far larger than what it is made of, its size is computed before.
"""

from __future__ import annotations

import contextlib
import contextvars
import datetime
import functools
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NoReturn

from pastkey.errors import missing_extra
from pastkey.values import shown

if TYPE_CHECKING:
    import jinja2

MAX_SOURCE = 200_000  # characters of a template; the longest public ones have some 30,000
MAX_TEXT = 4_000_000  # characters of a text that it makes, about a million tokens
MAX_WRITTEN = 100_000_000  # characters of all texts that it makes on the way
MAX_STEPS = 2_000_000
MAX_SECONDS = 1.5  # of this thread's processor time; a usual template takes milliseconds
_MAX_BITS = 20_000  # of a whole number
_MAX_ARGUMENT = 100_000  # a width, a count
_LOOK = 1_000  # steps between two looks at the clock


class OverBudgetError(Exception):
    """A template that spends more than its budget."""


class Budget:
    """What one rendering may still spend."""

    def __init__(self) -> None:
        self._steps = MAX_STEPS
        self._written = MAX_WRITTEN
        self._look_at = MAX_STEPS
        self._end = time.thread_time() + MAX_SECONDS
        self._length = 0  # of the rendering

    def spend(self, steps: int = 1) -> None:
        self._steps -= steps
        if self._steps < self._look_at:
            self._look_at = self._steps - _LOOK
            if self._steps < 0:
                raise OverBudgetError(f"more than {MAX_STEPS:,} steps")
            if time.thread_time() > self._end:
                raise OverBudgetError(f"more than {MAX_SECONDS:g} seconds")

    def text(self, length: int) -> None:
        """Takes in a text of this length, before or after it is made."""
        if length > MAX_TEXT:
            raise OverBudgetError(f"a text of more than {MAX_TEXT:,} characters")
        self._written -= length
        if self._written < 0:
            raise OverBudgetError(f"texts of more than {MAX_WRITTEN:,} characters together")
        self.spend()

    def rendered(self, length: int) -> None:
        """Takes in a piece of the rendering itself."""
        self._length += length
        self.text(self._length if self._length > MAX_TEXT else 0)

    def made(self, value: Any) -> Any:
        """Takes in what an operation made, and gives it back."""
        if isinstance(value, str | bytes):
            self.text(len(value))
        elif isinstance(value, bool) or value is None:
            self.spend()
        elif isinstance(value, int):
            self.bits(value.bit_length())
        else:
            self.size(value)
        return value

    def bits(self, count: int) -> None:
        if count > _MAX_BITS:
            raise OverBudgetError(f"a number of more than {_MAX_BITS:,} bits")
        self.spend()

    def size(self, value: Any) -> int:
        """The characters of all texts in a value. Each part is a step: one that holds another twice counts it twice."""
        total, parts = 0, [value]
        while parts:
            part = parts.pop()
            self.spend()
            if isinstance(part, str | bytes):
                total += len(part)
            elif isinstance(part, dict):
                self.spend(2 * len(part))
                parts += part.keys()
                parts += part.values()
            elif isinstance(part, list | tuple | set | frozenset):
                self.spend(len(part))
                parts += part
            elif type(part).__name__ == "Namespace":
                parts.append(dict(getattr(part, "_Namespace__attrs", {})))
            else:
                total += 20  # about what a number takes
        return total

    def printed(self, value: Any) -> str:
        """`str` of a value."""
        if isinstance(value, str):
            self.text(len(value))
            return value
        self.text(self.size(value))
        return str(value)


_current: contextvars.ContextVar[Budget] = contextvars.ContextVar("budget")


@contextlib.contextmanager
def budget() -> Iterator[Budget]:
    """What is compiled or rendered inside has one budget together."""
    made = Budget()
    token = _current.set(made)
    try:
        yield made
    finally:
        _current.reset(token)


def environment() -> jinja2.Environment:
    """The sandbox, with what templates rely on beyond plain Jinja. Raises MissingExtraError without jinja2."""
    try:
        import jinja2
        import jinja2.ext
        from jinja2 import nodes, parser, sandbox
    except ModuleNotFoundError as error:
        raise missing_extra(error) from None

    class GenerationBlock(jinja2.ext.Extension):
        """{% generation %} ... {% endgeneration %}: marks what the assistant says, for training; here its body."""

        tags = {"generation"}  # noqa: RUF012 - Jinja's own form

        def parse(self, parser: parser.Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    class Bounded(sandbox.ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset({"+", "-", "*", "**", "%"})

        def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
            return _charged(super()._parse(source, name, filename), self)

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            _before_operator(operator, left, right)
            return _shallow(super().call_binop(context, operator, left, right))

        def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 - as Jinja's
            if not callable(__obj):
                raise TypeError(f"{type(__obj).__name__!r} object is not callable")
            other = _before_call(__obj, args, kwargs)
            called = __obj if other is None else other
            return _current.get().made(super().call(__context, called, *args, **kwargs))

    made = Bounded(trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, jinja2.ext.loopcontrols])
    made.filters |= {"tojson": _to_json, "join": jinja2.pass_environment(_join)}
    made.filters = {name: _bounded_filter(name, filter_) for name, filter_ in made.filters.items()}
    tests: dict[str, Any] = dict(made.tests)
    made.tests = {name: _bounded_test(test) for name, test in tests.items()}
    for name, own in {"_emit": _emit, "_loop": _loop, "_concat": _concat, "_made": _made, "_shallow": _shallow}.items():
        # One that takes the context is not called at compile time, on constants.
        made.filters[name] = jinja2.pass_context(lambda context, value, own=own: own(value))
    made.globals |= {"raise_exception": _raise, "strftime_now": _time}
    del made.globals["lipsum"]
    return made


# --- the syntax tree ----------------------------------------------------------------------------------------------
def _charged(template: jinja2.nodes.Template, environment: jinja2.Environment) -> jinja2.nodes.Template:
    """The template with our filters around what Jinja compiles to plain Python."""
    from jinja2 import nodes, visitor

    def through(name: str, node: Any) -> nodes.Filter:
        return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)

    class Charge(visitor.NodeTransformer):
        def visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> Any:
            self.generic_visit(node, *args, **kwargs)
            if isinstance(node, nodes.Output):
                plain = [
                    nodes.Const(part.data) if isinstance(part, nodes.TemplateData) else part for part in node.nodes
                ]
                node.nodes = [through("_emit", part.set_lineno(node.lineno)) for part in plain]
            elif isinstance(node, nodes.For):
                node.iter = through("_loop", node.iter)
            elif isinstance(node, nodes.Concat):
                return through("_concat", nodes.List(node.nodes, lineno=node.lineno))
            elif isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice):
                return through("_shallow", node)
            elif isinstance(node, nodes.List | nodes.Tuple | nodes.Dict | nodes.Compare):
                return node if getattr(node, "ctx", "load") == "store" else through("_made", node)
            return node

    found: nodes.Template = Charge().visit(template)
    found.set_environment(environment)
    return found


def _emit(value: Any) -> str:
    return _current.get().printed(value)


def _loop(value: Any) -> Any:
    spent = _current.get()
    if hasattr(value, "__len__"):
        spent.spend(len(value))
        return value
    return _counted(value, spent)


def _counted(values: Iterable[Any], spent: Budget) -> Iterator[Any]:
    for value in values:
        spent.spend()
        yield value


def _concat(values: list[Any]) -> str:
    spent = _current.get()
    texts = list(map(spent.printed, values))
    spent.text(sum(map(len, texts)))
    return "".join(texts)


def _made(value: Any) -> Any:
    return _current.get().made(value)


def _shallow(value: Any) -> Any:
    """Takes in a slice or a sum, which nests nothing deeper than it was."""
    spent = _current.get()
    if isinstance(value, list | tuple):
        spent.spend(1 + len(value) // 4)
        return value
    return spent.made(value)


# --- operators, calls and filters ---------------------------------------------------------------------------------
_WIDTH = re.compile(
    r"%[^a-zA-Z%]*(\d{6}|\*)|\{[^{}]*:[^{}]*(\d{6}|\{)"
)  # in a format: a large one, or one that is given


def _before_operator(operator: str, left: Any, right: Any) -> None:
    spent = _current.get()
    if operator == "*":
        if isinstance(left, int) and isinstance(right, int):
            spent.bits(left.bit_length() + right.bit_length())
        for sequence, count in ((left, right), (right, left)):
            if isinstance(count, int) and isinstance(sequence, str | bytes):
                spent.text(len(sequence) * max(count, 0))
            elif isinstance(count, int) and isinstance(sequence, list | tuple):
                spent.spend(len(sequence) * max(count, 0))
    elif operator == "**" and isinstance(left, int) and isinstance(right, int):
        spent.bits(left.bit_length() * max(right, 0))
    elif operator == "%" and isinstance(left, str | bytes):
        _before_format(left, right)


def _before_format(form: str | bytes, values: Any) -> None:
    text = form if isinstance(form, str) else form.decode("latin-1")
    if _WIDTH.search(text):
        raise OverBudgetError("a format of such a width")
    spent = _current.get()
    spent.text(len(text) + (text.count("%") + text.count("{")) * spent.size(values))


def _before_replace(text: str, old: Any = "", new: Any = "", *_: Any) -> None:
    if isinstance(old, str) and isinstance(new, str):
        _current.get().text(len(text) + (text.count(old) * len(new) if old else (len(text) + 1) * len(new)))


def _small(*values: Any) -> None:
    if any(isinstance(value, int) and abs(value) > _MAX_ARGUMENT for value in values):
        raise OverBudgetError(f"a width or a count above {_MAX_ARGUMENT:,}")


def _before_call(called: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[..., Any] | None:
    """Charges a call. Gives what is to be called in its place, where that is something else."""
    spent = _current.get()
    bound = getattr(called, "__wrapped__", called)  # Jinja wraps str.format
    owner, name = getattr(bound, "__self__", None), getattr(called, "__name__", "")
    if called is range or name == "safe_range":
        spent.spend(len(range(*args)))
    elif getattr(called, "catch_varargs", False) or getattr(called, "catch_kwargs", False):  # a macro keeps them
        spent.size([*args, kwargs])
    elif type(called).__name__ == "LoopContext":
        return lambda values: called(_loop(values))
    elif isinstance(owner, str | bytes | int):
        spent.spend(1 + (0 if isinstance(owner, int) else len(owner) // 1000))
        _small(*args, *kwargs.values())
        if name in ("format", "format_map"):
            _before_format(str(owner), [args, kwargs])
        elif name == "replace" and isinstance(owner, str):
            _before_replace(owner, *args)
        elif name == "expandtabs":
            spent.text(len(str(owner)) + str(owner).count("\t") * max([8, *args, *kwargs.values()]))
        elif name == "join" and isinstance(owner, str):
            return lambda values: _joined(owner, values)
        elif name == "translate":
            raise OverBudgetError("str.translate")
    spent.spend()
    return None


def _joined(separator: str, values: Iterable[Any]) -> str:
    """`str.join`, which takes texts only."""
    spent = _current.get()
    texts = list(_counted(values, spent))
    spent.text(sum(len(separator) + (len(text) if isinstance(text, str) else 0) for text in texts))
    return separator.join(texts)


# Filters that take a container as such; any other one makes a text of it.
_OF_CONTAINERS = frozenset(
    {
        "attr", "batch", "count", "d", "default", "dictsort", "first", "groupby", "items", "join", "last", "length",
        "list", "map", "max", "min", "random", "reject", "rejectattr", "reverse", "select", "selectattr", "slice",
        "sort", "sum", "unique",
    }
)  # fmt: skip
# Of short texts only: they are slow, or make a text of another size.
_SHORT = frozenset({"filesizeformat", "pprint", "striptags", "urlencode", "urlize", "wordwrap", "xmlattr"})
_WIDE = frozenset({"batch", "center", "filesizeformat", "indent", "round", "slice", "truncate", "urlize", "wordwrap"})


def _bounded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    first = 1 if hasattr(function, "jinja_pass_arg") else 0

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        spent = _current.get()
        value, *rest = args[first:]
        given = [*rest, *kwargs.values()]
        length = 0
        if isinstance(value, str):
            length = len(value)
        elif name not in _OF_CONTAINERS:
            length = spent.size(value)
            spent.text(length)
        spent.spend(1 + length // 1000)
        if name in _WIDE:
            _small(*given)
        if name in _SHORT and length + spent.size(given) > _MAX_ARGUMENT:
            raise OverBudgetError(f"a text of more than {_MAX_ARGUMENT:,} characters in the filter {name}")
        if name == "replace":
            _before_replace(str(value), *given)
        elif name == "format":
            _before_format(str(value), [rest, kwargs])
        elif name == "indent":
            widths = [len(width) if isinstance(width, str) else int(width) for width in given]
            spent.text(length + (str(value).count("\n") + 1) * max([4, *widths]))
        elif name == "sum" and any(isinstance(start, str | list | tuple) for start in [*rest[1:], kwargs.get("start")]):
            raise OverBudgetError("a sum of containers")
        return spent.made(function(*args, **kwargs))

    return run


def _bounded_test(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        _current.get().spend()
        return function(*args, **kwargs)

    return run


def _join(environment: Any, value: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
    """Jinja's filter of this name, piece by piece."""
    from jinja2.filters import make_attrgetter

    spent = _current.get()
    get = None if attribute is None else make_attrgetter(environment, attribute)
    texts = [spent.printed(item if get is None else get(item)) for item in value]
    spent.text(sum(len(d) + len(text) for text in texts))
    return d.join(texts)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter of this name escapes what would be HTML."""
    wide = indent if isinstance(indent, int) else len(indent or "")
    if wide > 100 or any(len(separator) > 100 for separator in separators or ()):
        raise OverBudgetError("JSON of such a width")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: Any) -> NoReturn:
    raise ValueError(_current.get().printed(message)[:1000])


def _time(form: str) -> str:
    if len(form) > 1000:
        raise OverBudgetError("a form of the time of more than 1,000 characters")
    return datetime.datetime.now().strftime(form)


def plain(value: Any) -> Any:
    """A copy of JSON's types only, for a template must not reach the methods of anything else."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    tolist = getattr(value, "tolist", None)  # numpy's numbers and arrays
    if callable(tolist):
        return plain(tolist())
    raise TypeError(f"{shown(value)} is a {type(value).__name__}; text, numbers, lists and dicts were expected")
