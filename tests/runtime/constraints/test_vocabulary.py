from __future__ import annotations

import builtins
import json
import time
from typing import Any

import numpy as np
import pytest

pytest.importorskip("llguidance")

from pastkey.errors import InputError, MissingExtraError
from pastkey.runtime.constraints.constraint import Constraint
from pastkey.runtime.constraints.matcher import Matcher
from pastkey.runtime.constraints.vocabulary import Vocabulary
from pastkey.runtime.text.codec import TextCodec

from . import vocabularies

VOCABULARIES = [vocabularies.vocabulary_of(make()) for make in vocabularies.MAKES]
BYTES, PIECES, CHARACTERS = VOCABULARIES


def matcher(vocabulary: Vocabulary, **options: Any) -> Matcher:
    constraint = Constraint.of(options)
    assert constraint is not None
    return vocabulary.matcher(constraint)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"regex": "("}, "regex cannot be followed: unclosed group; correct that, or leave it out"),
    ({"regex": "a(?=b)"}, "regex cannot be followed: look-around"),
    ({"regex": "[^\\s\\S]"}, "no text can meet regex"),
    ({"grammar": "start: x"}, 'grammar cannot be followed: .*unknown name: "x"'),
    ({"grammar": 'start: a\na: a "b"'}, "no text can meet grammar"),
    ({"json_schema": {"type": "objec"}}, "json_schema cannot be followed: Invalid type: objec; correct that"),
    ({"json_schema": {"type": "array", "uniqueItems": True}}, 'cannot be followed: Unimplemented keys: ."uniqueItems"'),
    ({"json_schema": {"allOf": [{"type": "string"}, {"type": "null"}]}}, "cannot be followed: Unsatisfiable schema"),
    ({"json_schema": {"$ref": "#"}}, "no text can meet json_schema"),
    ({"json_schema": {"$ref": "https://example.com/x"}}, "json_schema cannot be followed: .*not present"),
]


def test_chains_as_long_as_the_limits_allow_compile():
    """llguidance recurses along them, and a stack that is full ends the process."""
    chain: dict[str, Any] = {f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}]} for i in range(990)}
    rules = "start: r0\n" + "".join(f'r{i}: "a" r{i + 1}\n' for i in range(2500)) + 'r2500: "b"'
    assert matcher(BYTES, json_schema={"$defs": {**chain, "d990": {"type": "null"}}, "$ref": "#/$defs/d0"}).can_begin
    assert matcher(BYTES, grammar=rules).can_begin


@pytest.mark.parametrize(("options", "sentence"), WRONG, ids=[sentence[:40] for _, sentence in WRONG])
def test_a_wrong_constraint_is_refused(options, sentence):
    for _ in range(2):
        with pytest.raises(InputError, match=sentence) as error:
            matcher(BYTES, **options)
        assert "\n" not in str(error.value)


def test_what_the_vocabulary_cannot_write_is_told_at_the_call():
    for options, sentence in (
        ({"choices": ["abc", "a\nb"]}, "choices asks for .*, and no token of this model's vocabulary writes '.n'"),
        ({"json_schema": {"properties": {"Z": {}}, "required": ["Z"]}}, "json_schema asks for '\"Z\"', .* writes 'Z'"),
        ({"json_schema": {"enum": [1, "Ω"]}}, "writes 'Ω'"),
        ({"json_schema": {"const": {"a": "Ω"}}}, "writes 'Ω'"),
        ({"regex": "aΩ|bΩ"}, "no text can meet regex"),
    ):
        with pytest.raises(InputError, match=sentence):
            matcher(CHARACTERS, **options)
        assert matcher(BYTES, **options).can_begin
        assert matcher(PIECES, **options).can_begin


def test_a_regex_never_leads_to_a_character_without_a_token():
    following = matcher(CHARACTERS, regex="aΩ|ab")
    ids = following.forced(9)
    assert len(ids) == 2
    following.follow(ids, 0)
    assert following.complete


HUGE: list[dict[str, Any]] = [
    {"json_schema": {"properties": {f"key{i}": {"type": "string"} for i in range(1900)}}},
    {"json_schema": {"anyOf": [{"type": "object", "properties": {f"k{i}": {"type": "null"}}} for i in range(600)]}},
    {"json_schema": {"enum": list(range(100_000 // 7))}},
    {"json_schema": {"type": "array", "items": {"type": "string"}, "minItems": 1_000_000}},
    {"json_schema": {"type": "string", "minLength": 10_000_000}},
    {"regex": "((a{1,1000}){1,1000}){1,1000}"},
    {"regex": "(a?){5000}b{5000}"},
    {"regex": "(.*a){50}.{300}"},
    {"regex": "(" * 20_000 + ")" * 20_000},
    {"grammar": "start: " + " | ".join(['"b"'] * 8_000)},
    {"grammar": "start: " + " ".join(['"b"?'] * 7_000)},
    {"grammar": "start: " + "(" * 20_000 + '"a"' + ")" * 20_000},
    {"choices": ["a" * (i % 40) + str(i) for i in range(10_000)]},
]


@pytest.mark.parametrize("number", range(len(HUGE)))
def test_a_huge_one_is_refused_or_begun_in_seconds(number):
    started = time.process_time()
    try:
        following = matcher(BYTES, **HUGE[number])
        for place in range(3):
            allowed = np.flatnonzero(np.isfinite(following.masked(np.zeros(BYTES.size, np.float32))))
            following.follow([int(allowed[0])], -place)
    except InputError:
        pass
    assert time.process_time() - started < 20


def test_a_constraint_is_compiled_once(monkeypatch):
    """Each matcher begins anew."""
    import llguidance

    first = matcher(BYTES, regex="abc")
    monkeypatch.setattr(llguidance, "LLMatcher", None)
    first.follow(first.forced(9)[:1], 0)
    second = matcher(BYTES, regex="abc")
    assert second.forced(9) != first.forced(9)
    with pytest.raises(AttributeError):
        matcher(BYTES, regex="another")


def test_whitespace_is_json_dumps_unless_the_schema_says_otherwise():
    schema = {"const": {"a": [1, 2], "b": None}}
    compact = schema | {"x-guidance": {"item_separator": ",", "key_separator": ":", "whitespace_flexible": False}}
    for given, expected in ((schema, json.dumps(schema["const"])), (compact, '{"a":[1,2],"b":null}')):
        following = matcher(BYTES, json_schema=given)
        ids = following.forced(99)
        following.follow(ids, 0)
        assert TextCodec(vocabularies.byte_level()).decode(ids) == expected
        assert following.complete


def test_without_the_library_one_sentence_says_what_to_install(monkeypatch):
    original = builtins.__import__

    def missing(name: str, *rest: Any, **named: Any) -> Any:
        if name == "llguidance":
            raise ModuleNotFoundError("No module named 'llguidance'", name="llguidance")
        return original(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(MissingExtraError, match="pip install llguidance"):
        vocabularies.vocabulary_of(vocabularies.byte_level())
