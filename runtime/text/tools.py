"""Tools for chat templates: JSON schemas, or Python functions described by type hints and docstrings."""

from __future__ import annotations

import inspect
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pastkey.errors import InputError
from pastkey.values import shown

Tool = Mapping[str, Any] | Callable[..., Any]
_TYPES: dict[Any, dict[str, Any]] = {
    str: {"type": "string"},
    int: {"type": "integer"},
    float: {"type": "number"},
    bool: {"type": "boolean"},
    list: {"type": "array"},
    dict: {"type": "object"},
    Any: {},
}
_SECTION = re.compile(r"^\s*(Args|Arguments|Parameters|Returns|Yields|Raises|Examples?|Notes?):\s*$", re.MULTILINE)
_ARGUMENT = re.compile(r"(\w+)\s*(?:\([^)]*\))?:\s*(.*)")


def tool_schemas(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """The tools as {"type": "function", "function": {"name", "description", "parameters"}}.

    Given schemas stay unchanged; a schema without parameters gets empty ones.

    Raises InputError for anything but a schema with a name or a function with type hints that JSON can express.
    """
    return [_whole(tool) if isinstance(tool, Mapping) and tool_name(tool) else _schema(tool) for tool in tools]


def tool_name(schema: Mapping[str, Any]) -> str | None:
    """The name of the function that a schema describes."""
    inner = schema.get("function", schema)
    name = inner.get("name") if isinstance(inner, Mapping) else None
    return name if isinstance(name, str) else None


def _whole(schema: Mapping[str, Any]) -> dict[str, Any]:
    function = dict(schema.get("function", schema))
    function.setdefault("parameters", {"type": "object", "properties": {}})
    return {**schema, "function": function} if "function" in schema else function


def _schema(tool: Any) -> dict[str, Any]:
    if not callable(tool) or not hasattr(tool, "__name__"):
        raise InputError(
            f'a tool is {shown(tool)}; a JSON schema such as {{"type": "function", "function": {{"name": ...}}}} or a '
            "function was expected"
        )
    description, told = _docstring(inspect.getdoc(tool) or "")
    try:
        hints = typing.get_type_hints(tool)
        parameters = inspect.signature(tool).parameters
    except (NameError, TypeError, ValueError) as error:
        raise InputError(f"the tool {tool.__name__} cannot be described: {error}; give its JSON schema") from None
    properties, required = {}, []
    for name, parameter in parameters.items():
        if name not in hints or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise InputError(
                f"the tool {tool.__name__} cannot be described: its argument {name} has no type hint; give it one, or "
                "give the tool's JSON schema"
            )
        hint = _hint(hints[name])
        if hint is None:
            raise InputError(
                f"the tool {tool.__name__} cannot be described: its argument {name} is {shown(hints[name])}, which is "
                "not a type of JSON; give the tool's JSON schema"
            )
        properties[name] = hint | ({"description": told[name]} if name in told else {})
        if parameter.default is parameter.empty:
            required.append(name)
    schema: dict[str, Any] = {"type": "object", "properties": properties}
    if required:
        schema["required"] = required
    function = {"name": tool.__name__, "description": description, "parameters": schema}
    return {"type": "function", "function": function}


def _hint(hint: Any) -> dict[str, Any] | None:
    """The JSON schema of a type hint, or None if JSON has no such type."""
    if hint in _TYPES:
        return dict(_TYPES[hint])
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (list, dict) and not inner:  # typing.List
        return dict(_TYPES[origin])
    if origin is typing.Literal:
        kinds = list(dict.fromkeys(_TYPES.get(type(value), {}).get("type") for value in inner))
        return None if None in kinds else {"type": kinds[0] if len(kinds) == 1 else kinds, "enum": list(inner)}
    if origin in (typing.Union, types.UnionType):
        found = [_hint(part) for part in inner if part is not type(None)]
        if None in found:
            return None
        made = found[0] if len(found) == 1 else {"anyOf": found}
        return (made or {}) | ({"nullable": True} if type(None) in inner else {})
    if origin is list:
        items = _hint(inner[0])
        return None if items is None else {"type": "array", "items": items}
    if origin is dict and inner[0] is str:
        values = _hint(inner[1])
        return None if values is None else {"type": "object", "additionalProperties": values}
    return None


def _docstring(text: str) -> tuple[str, dict[str, str]]:
    """The summary and the arguments' descriptions of a docstring in Google style."""
    parts = _SECTION.split(text)
    sections = dict(zip(parts[1::2], parts[2::2], strict=True))
    told: dict[str, str] = {}
    lines = (sections.get("Args") or sections.get("Arguments") or sections.get("Parameters") or "").splitlines()
    indents = [len(line) - len(line.lstrip()) for line in lines if line.strip()]
    name = ""
    for line in filter(str.strip, lines):
        found = _ARGUMENT.fullmatch(line.strip()) if len(line) - len(line.lstrip()) == min(indents) else None
        if found:
            name = found[1]
            told[name] = found[2].strip()
        elif name:
            told[name] = f"{told[name]} {line.strip()}".strip()
    return parts[0].strip(), told
