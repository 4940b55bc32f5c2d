"""Functions as JSON schemas."""

from __future__ import annotations

import typing
from typing import Any

import pytest

from pastkey.errors import InputError
from pastkey.runtime.text.tools import tool_name, tool_schemas


def test_schemas_stay_as_they_are():
    takes = {"type": "object", "properties": {"x": {}}}
    schemas: list[dict[str, Any]] = [
        {"type": "function", "function": {"name": "a", "parameters": takes}},
        {"name": "b", "x": 1, "parameters": takes},
    ]
    assert tool_schemas(schemas) == schemas
    assert [tool_name(schema) for schema in schemas] == ["a", "b"]


def test_a_schema_without_parameters_takes_none():
    schemas: list[dict[str, Any]] = [{"type": "function", "function": {"name": "a"}}, {"name": "b"}]
    none = {"type": "object", "properties": {}}
    assert tool_schemas(schemas) == [
        {"type": "function", "function": {"name": "a", "parameters": none}},
        {"name": "b", "parameters": none},
    ]
    assert schemas[1] == {"name": "b"}


def no_hint(x) -> None:
    pass


def odd_hint(x: bytes) -> None:
    pass


def many(*x: int) -> None:
    pass


@pytest.mark.parametrize(
    ("tools", "words"),
    [
        ([3], "a tool is 3; a JSON schema such as .* or a function was expected"),
        ([{"type": "function"}], "a tool is .*; a JSON schema"),
        ([no_hint], "the tool no_hint cannot be described: its argument x has no type hint"),
        ([odd_hint], "the tool odd_hint .* argument x .*bytes"),
        ([many], "the tool many .* type hint"),
    ],
)
def test_what_is_no_tool_is_told(tools, words):
    with pytest.raises(InputError, match=words):
        tool_schemas(tools)


def test_a_list_or_dict_of_typing_may_say_nothing_of_what_it_holds():
    def tool(a: typing.List, b: typing.Dict) -> None:  # type: ignore[type-arg]  # noqa: UP006
        pass

    found = tool_schemas([tool])[0]["function"]["parameters"]["properties"]
    assert found == {"a": {"type": "array"}, "b": {"type": "object"}}
