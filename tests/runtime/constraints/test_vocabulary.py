from __future__ import annotations

import json
import sys
import time

import numpy as np
import pytest

pytest.importorskip("llguidance")

from pastkey.errors import InputError, MissingExtraError
from pastkey.runtime.text.codec import TextCodec

from . import vocabularies
from .vocabularies import matcher

VOCABULARIES = [vocabularies.vocabulary_of(make()) for make in vocabularies.MAKES]
BYTES, PIECES, CHARACTERS = VOCABULARIES


WRONG = [
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


@pytest.mark.parametrize(("options", "sentence"), WRONG, ids=[sentence[:40] for _, sentence in WRONG])
def test_a_wrong_constraint_is_refused(options, sentence):
    for _ in range(2):
        with pytest.raises(InputError, match=sentence) as error:
            matcher(BYTES, **options)
        assert "\n" not in str(error.value)


UNWRITABLE = [
    ({"choices": ["abc", "a\nb"]}, "choices asks for .*, and no token of this model's vocabulary writes '.n'"),
    ({"json_schema": {"properties": {"Z": {}}, "required": ["Z"]}}, "json_schema asks for '\"Z\"', .* writes 'Z'"),
    ({"json_schema": {"enum": [1, "Ω"]}}, "writes 'Ω'"),
    ({"json_schema": {"const": {"a": "Ω"}}}, "writes 'Ω'"),
    ({"regex": "aΩ|bΩ"}, "no text can meet regex"),
]


@pytest.mark.parametrize(("options", "words"), UNWRITABLE)
def test_what_the_vocabulary_cannot_write_is_told_at_the_call(options, words):
    with pytest.raises(InputError, match=words):
        matcher(CHARACTERS, **options)
    assert matcher(BYTES, **options).can_begin
    assert matcher(PIECES, **options).can_begin


def test_a_regex_never_leads_to_a_character_without_a_token():
    following = matcher(CHARACTERS, regex="aΩ|ab")
    following.follow(following.forced(9), 0)
    assert following.complete


HUGE = [
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


@pytest.mark.parametrize("options", HUGE, ids=range(len(HUGE)))
def test_a_huge_one_is_refused_or_begun_in_seconds(options):
    started = time.process_time()
    try:
        following = matcher(BYTES, **options)
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
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(MissingExtraError, match="pip install llguidance"):
        vocabularies.vocabulary_of(vocabularies.byte_level())
