import json
from typing import Any

import pytest

from pastkey.errors import InputError
from pastkey.runtime.constraints.constraint import MAX_CHOICES, Constraint
from pastkey.runtime.options import options_of
from pastkey.runtime.settings import GENERATE_OPTIONS


class Model:
    """As a model of Pydantic 2, whose class writes its schema."""

    @classmethod
    def model_json_schema(cls):
        return {"type": "object", "title": cls.__name__}


class Unwritten:
    @classmethod
    def model_json_schema(cls):
        raise TypeError("a function has no schema\nsee errors.pydantic.dev")


def test_a_schema_may_be_the_class_of_a_model():
    taken = options_of("generate", {"json_schema": Model, "seed": None}, GENERATE_OPTIONS)
    assert taken == {"json_schema": {"type": "object", "title": "Model"}}
    with pytest.raises(InputError, match=r"which has no JSON schema \(a function has no schema\): change its fields$"):
        options_of("generate", {"json_schema": Unwritten}, GENERATE_OPTIONS)


SCHEMA = {"properties": {"é": {"const": "日"}, "a": {"enum": ["b", 3]}}}
WRITTEN = Constraint("json_schema", json.dumps(SCHEMA, ensure_ascii=False))
TAKEN: list[tuple[dict[str, Any], Constraint | None]] = [
    ({"regex": None, "seed": 1}, None),
    ({"json_schema": SCHEMA}, WRITTEN),
    ({"json_schema": json.dumps(SCHEMA)}, WRITTEN),
    ({"json_schema": True}, Constraint("json_schema", "{}")),
    ({"json_schema": "true"}, Constraint("json_schema", "{}")),
    ({"choices": ("yes", 'n"o')}, Constraint("choices", '["yes", "n\\"o"]')),
]


@pytest.mark.parametrize(("options", "expected"), TAKEN)
def test_a_constraint_has_its_text(options, expected):
    assert Constraint.of(options) == expected


SELF: dict[str, Any] = {}
SELF["properties"] = {"a": SELF}


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"regex": "a", "choices": ["b"]}, "regex and choices were both given"),
    ({"json_schema": "{"}, "json_schema is not JSON"),
    ({"json_schema": False}, "json_schema is false"),
    ({"json_schema": " false "}, "json_schema is false"),
    ({"json_schema": "[" * 100_000}, "json_schema is not JSON"),
    ({"json_schema": "[1]"}, "a JSON schema was expected"),
    ({"json_schema": 3}, "json_schema is 3; a JSON schema was expected"),
    ({"json_schema": {"const": float("nan")}}, "holds a value that JSON cannot write"),
    ({"json_schema": SELF}, "holds a value that JSON cannot write"),
    ({"json_schema": {"const": "\ud800"}}, "half of a surrogate pair"),
    ({"json_schema": '{"title": "' + "x" * 600_000 + '"}'}, "json_schema has .* characters; at most 500000"),
    ({"json_schema": {"properties": {str(i): {} for i in range(3000)}}}, "has 3002 objects; at most 2000"),
    ({"grammar": 'start: "' + "a" * 60_000 + '"'}, "grammar has 60009 characters; at most 50000"),
    ({"regex": "a" * 60_000}, "regex has 60000 characters; at most 50000"),
    ({"choices": ["a"] * (MAX_CHOICES + 1)}, "choices holds 10001 texts of 10001 characters; at most 10000"),
]


@pytest.mark.parametrize(("options", "words"), REFUSED, ids=[words[:50] for _, words in REFUSED])
def test_an_invalid_constraint_is_refused(options, words):
    with pytest.raises(InputError, match=words):
        Constraint.of(options)
