from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from pastkey.errors import InputError
from pastkey.runtime.constraints.constraint import MAX_CHOICES, Constraint
from pastkey.runtime.options import options_of
from pastkey.runtime.settings import GENERATE_OPTIONS


def test_a_call_without_one_has_none():
    assert Constraint.of({}) is None
    assert Constraint.of({"regex": None, "seed": 1}) is None


def test_a_schema_is_taken_as_a_dict_or_as_its_text():
    schema = {"type": "object", "properties": {"é": {"const": "日"}}}
    as_dict, as_text = Constraint.of({"json_schema": schema}), Constraint.of({"json_schema": json.dumps(schema)})
    assert as_dict == as_text == Constraint("json_schema", json.dumps(schema, ensure_ascii=False))
    assert as_dict is not None
    assert sorted(as_dict.literals()) == ['"é"', '"日"']


class Model:
    """As a model of Pydantic 2, whose class writes its schema."""

    @classmethod
    def model_json_schema(cls) -> dict[str, Any]:
        return {"type": "object", "title": cls.__name__}


def test_a_schema_may_be_the_class_of_a_model():
    taken = options_of("generate", {"json_schema": Model, "seed": None}, GENERATE_OPTIONS)
    assert taken == {"json_schema": {"type": "object", "title": "Model"}}


def test_a_schema_may_be_a_model_of_pydantic():
    pydantic = pytest.importorskip("pydantic")
    city: Any = pydantic.create_model("City", name=str, area=(float, pydantic.Field(ge=0)))
    model = pydantic.create_model("Country", cities=list[city], capital=(city, ...))
    constraint = Constraint.of(options_of("generate", {"json_schema": model}, GENERATE_OPTIONS))
    assert constraint is not None
    assert json.loads(constraint.text) == model.model_json_schema()
    assert {*constraint.literals()} == {'"cities"', '"capital"', '"name"', '"area"'}
    unwritten = pydantic.create_model("Unwritten", call=Callable[[], int])
    with pytest.raises(
        InputError, match=r"^json_schema is <.*Unwritten.*has no JSON schema \(.+\): change its fields$"
    ):
        options_of("generate", {"json_schema": unwritten}, GENERATE_OPTIONS)


def test_boolean_schemas():
    expected = Constraint("json_schema", "{}")
    taken: tuple[Any, ...] = (True, "true", {}, "{}")
    refused: tuple[Any, ...] = (False, " false ")
    assert [Constraint.of({"json_schema": schema}) for schema in taken] == [expected] * len(taken)
    for schema in refused:
        with pytest.raises(InputError, match="json_schema is false, which no text validates"):
            Constraint.of({"json_schema": schema})


def test_choices_are_the_texts_that_must_be_written():
    constraint = Constraint.of({"choices": ("yes", 'n"o')})
    assert constraint is not None
    assert list(constraint.literals()) == ["yes", 'n"o']


SELF: dict[str, Any] = {}
SELF["properties"] = {"a": SELF}


BAD: list[tuple[dict[str, Any], str]] = [
    ({"regex": "a", "choices": ["b"]}, "regex and choices were both given"),
    ({"json_schema": "{"}, "json_schema is not JSON"),
    ({"json_schema": "[" * 100_000}, "json_schema is not JSON"),
    ({"json_schema": "[1]"}, "a JSON schema was expected"),
    ({"json_schema": 3}, "json_schema is 3; a JSON schema was expected"),
    ({"json_schema": {"const": float("nan")}}, "holds what JSON cannot write"),
    ({"json_schema": SELF}, "holds what JSON cannot write"),
    ({"json_schema": {"const": "\ud800"}}, "half of a surrogate pair"),
    ({"json_schema": '{"title": "' + "x" * 600_000 + '"}'}, "json_schema has .* characters; at most 500000"),
    ({"json_schema": {"properties": {str(i): {} for i in range(3000)}}}, "holds 3002 objects; at most 2000"),
    ({"grammar": 'start: "' + "a" * 60_000 + '"'}, "grammar has 60009 characters; at most 50000"),
    ({"regex": "a" * 60_000}, "regex has 60000 characters; at most 50000"),
    ({"choices": ["a"] * (MAX_CHOICES + 1)}, "choices holds 10001 texts of 10001 characters; at most 10000"),
]


@pytest.mark.parametrize(("options", "sentence"), BAD, ids=[sentence[:50] for _, sentence in BAD])
def test_an_invalid_constraint_is_refused(options, sentence):
    with pytest.raises(InputError, match=sentence):
        Constraint.of(options)
