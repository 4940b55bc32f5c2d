"""The environment of chat templates: Jinja's immutable sandbox with the extensions that templates use.

Jinja's sandbox keeps a template away from Python's objects. It bounds neither time nor memory, as nothing does for a
graph: the child process of `runtime/sandbox/` bounds both.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NoReturn

from pastkey.errors import missing_extra
from pastkey.values import shown

if TYPE_CHECKING:
    import jinja2

MAX_SOURCE = 200_000  # characters of a template; the longest public ones have about 30,000
MAX_OUTPUT = 4_000_000  # characters of a rendering, about a million tokens


def environment() -> jinja2.Environment:
    """The environment. Raises MissingExtraError without jinja2."""
    try:
        import jinja2.ext
        from jinja2 import nodes, parser, sandbox
    except ModuleNotFoundError as error:
        raise missing_extra(error) from None

    class GenerationBlock(jinja2.ext.Extension):
        """{% generation %} ... {% endgeneration %} marks the assistant's text for training. Renders its body."""

        tags = {"generation"}  # noqa: RUF012 - Jinja's own form

        def parse(self, parser: parser.Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    made = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[GenerationBlock, jinja2.ext.loopcontrols],
        # Otherwise constants such as 7**(10**8) are computed where a template is only compiled.
        optimized=False,
        finalize=jinja2.pass_context(lambda context, value: value),
    )
    made.filters["tojson"] = _to_json
    made.globals |= {"raise_exception": _raise, "strftime_now": _time}
    return made


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Replaces Jinja's filter of this name, which escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: Any) -> NoReturn:
    raise ValueError(str(message))


def _time(form: str) -> str:
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
