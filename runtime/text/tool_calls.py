"""Tool calls in a model's answer: what it wants called, read by the form that its chat template teaches.

    Hermes, Qwen   <tool_call>{"name": ..., "arguments": {...}}</tool_call>
    Llama 3        <|python_tag|>{"name": ..., "parameters": {...}}, or without the tag
    Mistral        [TOOL_CALLS] [{"name": ..., "arguments": {...}}], later [TOOL_CALLS]name[ARGS]{...}

An answer that is not whole in its form is text.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any, Literal

from pastkey.files.reading import parse_json

Form = Literal["hermes", "llama3", "mistral"]
Call = dict[str, Any]  # "name" and "arguments"

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_PYTHON = "<|python_tag|>"
_CALLS, _ARGS = "[TOOL_CALLS]", "[ARGS]"
_BETWEEN = frozenset("; \n\t\r")
_JSON = json.JSONDecoder()


def tool_call_form(template: str) -> Form | None:
    """The form that a chat template writes tool calls in, by its text; None where it is none of these."""
    if _CALLS in template:
        return "mistral"
    if _OPEN in template and "<function=" not in template:  # there the arguments are XML
        return "hermes"
    if _PYTHON in template or ("ipython" in template and '"parameters"' in template):
        return "llama3"
    return None


def parse_tool_calls(text: str, form: Form | None, known: Collection[str] = ()) -> tuple[str, list[Call]]:
    """The text before the calls, and the calls; the whole text and none where one of them is not in its form.

    Args:
        text: An answer, with its special tokens.
        form: What `tool_call_form` says.
        known: The names of the tools. A call without a mark must be of one of them.
    """
    try:
        said, calls = _read(text, form, known)
        # What all later code can take: no NaN, no half surrogate pair, no depth without end.
        parse_json(json.dumps(calls, allow_nan=False), "the calls")
    except (ValueError, RecursionError):
        return text, []
    return said, calls


def _read(text: str, form: Form | None, known: Collection[str]) -> tuple[str, list[Call]]:
    """Raises ValueError, RecursionError where the text is not in the form."""
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
    """What stands between the two marks; the last one may lack the second."""
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
    """Objects one after another, with ; between them or nothing."""
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
    """One call or a list of them, as JSON. Raises ValueError where it is neither, and for no call."""
    calls = []
    for entry in found if isinstance(found, list) else [found]:
        inner = entry.get("function", entry) if isinstance(entry, dict) else None
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str) or not inner["name"]:
            raise ValueError("a call has a name")
        arguments = inner.get("arguments", inner.get("parameters"))
        if isinstance(arguments, str):  # OpenAI's way
            arguments = json.loads(arguments or "{}")
        if arguments is None:
            arguments = {}
        if not isinstance(arguments, dict):
            raise ValueError("arguments are an object")
        calls.append({"name": inner["name"], "arguments": arguments})
    if not calls:
        raise ValueError("there is no call")
    return calls
