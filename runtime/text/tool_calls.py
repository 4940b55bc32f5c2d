"""Parses tool calls in a model's answer, in the form that its chat template uses.

    Hermes, Qwen   <tool_call>{"name": ..., "arguments": {...}}</tool_call>
    Llama 3        <|python_tag|>{"name": ..., "parameters": {...}}, or without the tag
    Mistral        [TOOL_CALLS] [{"name": ..., "arguments": {...}}], later [TOOL_CALLS]name[ARGS]{...}

An answer that does not parse completely is text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal

from pastkey.files.reading import parse_json

Form = Literal["hermes", "llama3", "mistral"]
Call = dict[str, Any]  # "name" and "arguments"

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_PYTHON = "<|python_tag|>"
_CALLS, _ARGS = "[TOOL_CALLS]", "[ARGS]"
MARKS = {"hermes": (_OPEN,), "mistral": (_CALLS,), "llama3": (_PYTHON,)}  # the beginnings of a first call
_BETWEEN = frozenset("; \n\t\r")
_JSON = json.JSONDecoder()


def tool_call_form(template: str) -> Form | None:
    """The form of tool calls in a chat template, by its text; None if unknown."""
    if _CALLS in template:
        return "mistral"
    if _OPEN in template and "<function=" not in template:  # with <function= the arguments are XML
        return "hermes"
    if _PYTHON in template or ("ipython" in template and '"parameters"' in template):
        return "llama3"
    return None


def parse_tool_calls(text: str, form: Form | None, known: Collection[str] = ()) -> tuple[str, list[Call]]:
    """The text before the calls, and the calls; the whole text and no calls if one of them is malformed.

    Args:
        text: An answer, with its special tokens.
        form: The result of `tool_call_form`.
        known: The names of the tools. A call without a mark must name one of them.
    """
    try:
        said, calls = _read(text, form, known)
        # Rejects values that later code does not support: NaN, half surrogate pairs, unbounded depth.
        parse_json(json.dumps(calls, allow_nan=False), "the calls")
    except (ValueError, RecursionError):
        return text, []
    return said, calls


# How a call is written around its arguments, and the calls around it.
_WRITTEN: dict[Form, tuple[str, str, str]] = {
    "hermes": ("\n", '{"name": %s, "arguments": ', "}\n"),
    "mistral": (" [", '{"name": %s, "arguments": ', "}]"),
    "llama3": ("", '{"name": %s, "parameters": ', "}"),
}
_SPACING = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}


def tool_names(tools: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """The names of tools, whose schemas are as `tool_schemas` returns them."""
    return tuple(str(tool.get("function", tool).get("name")) for tool in tools)


def call_grammar(form: Form, tools: Sequence[Mapping[str, Any]], token: Callable[[str], int | None]) -> str:
    """A grammar in Lark's notation of an answer that is one call of one of the tools, with arguments of its schema.

    Args:
        form: The form of calls.
        tools: Schemas as `tool_schemas` returns them.
        token: The id of a mark that is a special token, else None.
    """

    def mark(text: str) -> str:
        found = token(text)
        return json.dumps(text) if found is None else f"<[{found}]>"

    opening, head, closing = _WRITTEN[form]
    begin = "" if form == "llama3" else mark(MARKS[form][0]) + " "
    end = " " + mark(_CLOSE) if form == "hermes" else ""
    rules, calls = [], []
    for number, tool in enumerate(tools):
        inner = tool.get("function", tool)
        schema = {"x-guidance": _SPACING, **(inner.get("parameters") or {"type": "object"})}
        named = json.dumps(opening + head % json.dumps(inner["name"], ensure_ascii=False), ensure_ascii=False)
        rules.append(f"call{number}: {named} arguments{number} {json.dumps(closing)}")
        rules.append(f"arguments{number}: %json {json.dumps(schema, ensure_ascii=False)}")
        calls.append(f"call{number}")
    return "\n".join([f"start: {begin}({' | '.join(calls)}){end}", *rules])


def _read(text: str, form: Form | None, known: Collection[str]) -> tuple[str, list[Call]]:
    """As `parse_tool_calls`. Raises ValueError or RecursionError if the text is not in the form."""
    if form == "hermes" and _OPEN in text:
        said, *blocks = text.split(_OPEN)
        return said.rstrip(), [call for block in blocks for call in _block(block)]
    if form == "mistral" and _CALLS in text:
        said, *blocks = text.split(_CALLS)
        return said.rstrip(), [call for block in blocks for call in _listed(block)]
    if form == "llama3":
        said, mark, rest = text.partition(_PYTHON)
        calls = _sequence(rest if mark else text)
        if mark or all(call["name"] in known for call in calls):
            return said.rstrip() if mark else "", calls
    raise ValueError("there is no call")


def _block(text: str) -> list[Call]:
    """The calls between the two marks. The closing mark of the last block may be missing."""
    inside, _, after = text.partition(_CLOSE)
    if after.strip():
        raise ValueError("text after a call")
    return _calls(json.loads(inside))


def _listed(text: str) -> list[Call]:
    name, mark, arguments = text.partition(_ARGS)
    if mark:
        return _calls({"name": name.strip().partition("[CALL_ID]")[0], "arguments": json.loads(arguments)})
    return _calls(json.loads(text))


def _sequence(text: str) -> list[Call]:
    """The calls of consecutive JSON objects, optionally separated by semicolons."""
    calls: list[Call] = []
    text, place = text.strip(), 0
    while place < len(text):
        found, place = _JSON.raw_decode(text, place)
        if not isinstance(found, dict):
            raise ValueError("a call is an object")
        calls += _calls(found)
        while text[place : place + 1] in _BETWEEN:
            place += 1
    if not calls:
        raise ValueError("there is no call")
    return calls


def _calls(found: Any) -> list[Call]:
    """The calls of a JSON object or list. Raises ValueError for other values, and if there is no call."""
    calls = []
    for entry in found if isinstance(found, list) else [found]:
        inner = entry.get("function", entry) if isinstance(entry, dict) else None
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str) or not inner["name"]:
            raise ValueError("a call has a name")
        arguments = inner.get("arguments", inner.get("parameters"))
        if isinstance(arguments, str):  # OpenAI's form
            arguments = json.loads(arguments or "{}")
        if arguments is None:
            arguments = {}
        if not isinstance(arguments, dict):
            raise ValueError("arguments are an object")
        calls.append({"name": inner["name"], "arguments": arguments})
    if not calls:
        raise ValueError("there is no call")
    return calls
