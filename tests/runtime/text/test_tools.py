"""Functions as JSON schemas."""

from __future__ import annotations

import typing
from typing import Any, Literal

import pytest

from pastkey.errors import InputError
from pastkey.runtime.text.tools import tool_name, tool_schemas


def weather(city: str, days: int = 1, unit: Literal["C", "F"] = "C") -> str:
    """Tells the weather.

    Args:
        city: Which one,
            with its country.
        days: How far: at most 9.
        unit: Of the temperature.

    Returns:
        A sentence.
    """
    return f"{city} {days} {unit}"


def everything(
    a: float,
    b: bool,
    c: list[int],
    d: dict[str, float],
    e: str | None,
    f: list[Any],
    g: dict[str, Any],
    h: int | str = 3,
) -> None:
    """Does it.

    Args:
        a: A.
        b: B.
        c: C.
        d: D.
        e: E.
        f: F.
        g: G.
        h: H.
    """


@pytest.mark.parametrize("function", [weather, everything])
def test_the_schema_is_that_of_transformers(function):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: nothing to compare with")
    expected = transformers.utils.get_json_schema(function)
    expected["function"].pop("return", None)
    found = tool_schemas([function])[0]
    properties = found["function"]["parameters"]["properties"]
    union = properties.get("h", {})
    if "anyOf" in union:  # transformers writes a union of plain types in short
        properties["h"] = {"type": ["integer", "string"], "description": union["description"]}
    assert found == expected


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
