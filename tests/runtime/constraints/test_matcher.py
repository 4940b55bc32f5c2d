import json
import re
import sys
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

pytest.importorskip("llguidance")

from hypothesis import given, settings
from hypothesis import strategies as st

from pastkey.errors import InputError, MissingExtraError
from pastkey.runtime.constraints.constraint import Constraint
from pastkey.runtime.constraints.matcher import first_sentence
from pastkey.runtime.text.codec import TextCodec

from . import vocabularies

jsonschema = pytest.importorskip("jsonschema")


@dataclass(frozen=True)
class Make:
    """A vocabulary and the texts of its ids."""

    codec: TextCodec
    vocabulary: Any
    end: int

    def matcher(self, **options):
        return self.vocabulary.matcher(Constraint.of(options))

    def written(self, seed, most=300, *, jump=True, **options):
        """The text of random logits; None where they are not at an end after so many tokens."""
        rng, following, ids = np.random.default_rng(seed), self.matcher(**options), list[int]()
        while True:
            ids += following.forced(most - len(ids)) if jump else []
            following.follow(ids, 0)
            if following.complete:
                break
            if len(ids) >= most:
                return None
            logits = rng.normal(0, 3, self.vocabulary.size).astype(np.float32)
            logits[self.end] += 2
            masked = following.masked(logits)
            token = int(masked.argmax())
            assert (masked.dtype, masked[token]) == (np.float32, logits[token])
            if token == self.end:
                break
            ids.append(token)
            following.follow(ids, 0)
        return self.text(ids)

    def text(self, ids):
        """As after another text."""
        encode, decode = self.codec.encode, self.codec.decode
        before = encode("\n" if self.codec.begins_word(encode("a")[0]) else "a", add_special_tokens=False)
        return decode(before + ids)[len(decode(before)) :]


def made(make):
    tokenizer = make()
    return Make(TextCodec(tokenizer), vocabularies.vocabulary_of(tokenizer), tokenizer.token_to_id(vocabularies.END))


MAKES = [made(make) for make in vocabularies.MAKES]
BYTES, PIECES, CHARACTERS = MAKES

# --- schemas ----------------------------------------------------------------------------------------------------------
NAMES = st.text(st.sampled_from('ab"\\ é日{_1'), max_size=4)


def bounds(low, high):
    return st.tuples(st.integers(0, 3), st.integers(0, 3)).map(lambda pair: {low: min(pair), high: max(pair)})


LEAVES = st.one_of(
    bounds("minLength", "maxLength").map(lambda found: {"type": "string", **found}),
    st.sampled_from(["[0-9]{2}", "^a+$", "b|aé", "^(ab){1,3}$"]).map(lambda text: {"type": "string", "pattern": text}),
    bounds("minimum", "maximum").map(lambda found: {"type": "integer", **found}),
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"type": "integer"}, {"type": ["string", "null"]}]),
    st.lists(st.none() | st.booleans() | st.integers(-999, 999) | NAMES, min_size=1).map(lambda some: {"enum": some}),
)


@st.composite
def objects(draw, inner):
    properties = draw(st.dictionaries(NAMES, inner, max_size=4))
    required = draw(st.lists(st.sampled_from(sorted(properties)), unique=True)) if properties else []
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def named(schema):
    return schema if "$ref" in str(schema) else {"$defs": {"a/b~c": schema}, "$ref": "#/$defs/a~1b~0c"}


def containers(inner):
    return st.one_of(
        objects(inner),
        st.builds(lambda items, many: {"type": "array", "items": items, **many}, inner, bounds("minItems", "maxItems")),
        st.lists(inner, min_size=1, max_size=3).map(lambda options: {"anyOf": options}),
        inner.map(named),
    )


SCHEMAS = st.recursive(LEAVES, containers, max_leaves=8)


def test_output_validates_against_the_schema():
    """And most of these schemas are followed to their end."""
    ends = Counter[str]()

    @settings(max_examples=60)
    @given(SCHEMAS, st.integers(0, 2**32 - 1), st.booleans())
    def require_valid(schema, seed, jump):
        for make in MAKES:
            try:
                text = make.written(seed, json_schema=schema, jump=jump)
            except InputError as error:
                if make is not CHARACTERS and "cannot be followed" not in str(error):
                    raise
                ends["refused"] += 1
                continue
            ends["cut" if text is None else "valid"] += 1
            if text is not None:
                jsonschema.validate(json.loads(text), schema, jsonschema.Draft202012Validator)

    require_valid()
    assert ends["valid"] > 0.7 * ends.total(), ends


# --- expressions, choices, grammars -----------------------------------------------------------------------------------
EXPRESSIONS = [
    "[a-e]{2,5}", "(yes|no)( [0-9]+){1,2}", "a*b?", "日本?|é+", r"\{[^}]*\}", r"-?\d+(\.\d+)?", "x|the the", "^ab$",
    r"[ab]/?\D", r"a\sb",
]  # fmt: skip
CHOICES = st.lists(st.text(min_size=1), min_size=1, max_size=6)


@settings(max_examples=40)
@given(st.sampled_from(EXPRESSIONS), CHOICES, st.integers(0, 2**32 - 1), st.booleans())
def test_output_matches_the_regex_or_is_one_of_the_choices(expression, choices, seed, jump):
    for make in MAKES:
        text = make.written(seed, regex=expression, jump=jump)
        assert text is None or re.fullmatch(expression, text)
    for make in (BYTES, PIECES):
        assert make.written(seed, choices=choices, jump=jump) in choices


def test_each_of_the_choices_is_written_by_some_seed():
    choices = ["a", "ab", "abb", "the", "the cat", '{"', "日"]
    for make in MAKES:
        assert {make.written(seed, choices=choices) for seed in range(120)} == set(choices)


def test_a_grammar_may_name_a_special_token():
    tokenizer = vocabularies.byte_level()
    tokenizer.add_special_tokens(["<call>"])
    make = made(lambda: tokenizer)
    following = make.matcher(grammar='start: "a" <call> "b"')
    ids = [*make.codec.encode("a"), make.codec.added_tokens["<call>"][0], *make.codec.encode("b")]
    assert following.forced(9) == ids
    following.follow(ids, 0)
    assert following.complete


# --- the state --------------------------------------------------------------------------------------------------------
def test_forced_tokens():
    for make in MAKES:
        following = make.matcher(json_schema={"const": {"abe": "the"}})
        most = following.forced(3)
        following.follow(most, 0)
        assert len(most) == 3
        assert following.forced(0) == []
        rest = following.forced(99)
        following.follow([7, *most, *rest], 1)
        assert make.text(most + rest) == '{"abe": "the"}'
        assert following.complete
        assert following.forced(9) == []


def test_eos_is_allowed_only_where_the_grammar_is_met():
    for make in MAKES:
        following, logits = make.matcher(regex="ab*"), np.zeros(make.vocabulary.size, np.float32)
        (a,), (b,) = make.vocabulary._encode("a"), make.vocabulary._encode("b")
        assert np.isinf(following.masked(logits)[make.end])
        following.follow([a], 0)
        allowed = set(np.flatnonzero(np.isfinite(following.masked(logits))))
        assert {b, make.end} <= allowed
        assert {make.codec.bytes_of(int(token)) for token in allowed - {make.end}} == {b"b"}
        assert not following.complete


def test_a_draft_is_cut_where_it_may_not_go_on():
    """And the state stays the same."""
    following, ids, logits = BYTES.matcher(regex="abab[0-9]*"), BYTES.codec.encode, np.zeros(BYTES.vocabulary.size)
    assert following.allowed_draft([]) == following.allowed_draft(ids("x")) == []
    assert following.allowed_draft(ids("abab12x3")) == ids("abab12")
    assert not following.complete
    assert following.masked(logits)[ids("ab")[0]] == 0
    assert not logits.any()
    following.follow(ids("ab"), 0)
    expected = following.forced(20)
    following.restart()
    following.follow(ids("ab"), 0)
    assert following.forced(20) == expected


def test_a_token_that_may_not_follow_and_a_place_from_which_none_leads_on_are_errors_of_one_sentence():
    following = BYTES.matcher(regex="ab")
    with pytest.raises(InputError, match=r"^the grammar leads to a place.*$"):
        following.follow(BYTES.codec.encode("x"), 0)
    # A character that the vocabulary lacks, where it could not be seen before.
    following = CHARACTERS.matcher(grammar='start: "a" b\nb: "Ω"')
    following.follow(CHARACTERS.codec.encode("a"), 0)
    assert following.forced(9) == []
    with pytest.raises(InputError, match="vocabulary cannot continue"):
        _ = following.complete
    with pytest.raises(InputError, match="vocabulary cannot continue"):
        following.masked(np.zeros(CHARACTERS.vocabulary.size))


def test_a_token_that_another_option_forces_is_refused_with_the_reason():
    following = BYTES.matcher(regex="ab*")
    a, x = BYTES.codec.encode("a")[0], BYTES.codec.encode("x")[0]
    following.require(a)
    for token in (x, BYTES.end):
        with pytest.raises(InputError, match="no allowed token"):
            following.require(token)
    following.follow([a], 0)
    following.require(BYTES.end)


def test_the_first_line_tells_what_is_wrong():
    assert first_sentence("at 1(8): x\n  |\nerror: unclosed group\n") == "unclosed group"
    assert first_sentence("NoExtensionBias\n<non-verbose/>") == "NoExtensionBias"
    assert first_sentence("") == ""


# --- what a vocabulary compiles -------------------------------------------------------------------------------------
WRONG = [
    ({"regex": "("}, "regex cannot be followed: unclosed group; correct that, or leave it out"),
    ({"regex": "a(?=b)"}, "regex cannot be followed: look-around"),
    ({"regex": "[^\\s\\S]"}, "no text can meet regex"),
    ({"grammar": "start: x"}, 'grammar cannot be followed: .*unknown name: "x"'),
    ({"grammar": 'start: a\na: a "b"'}, "no text can meet grammar"),
    ({"json_schema": {"type": "objec"}}, "json_schema cannot be followed: Invalid type: objec; correct that"),
    ({"json_schema": {"$ref": "#"}}, "no text can meet json_schema"),
    ({"json_schema": {"$ref": "https://example.com/x"}}, "json_schema cannot be followed: .*not present"),
]


@pytest.mark.parametrize(("options", "sentence"), WRONG, ids=[sentence[:40] for _, sentence in WRONG])
def test_a_wrong_constraint_is_refused(options, sentence):
    for _ in range(2):
        with pytest.raises(InputError, match=sentence) as error:
            BYTES.matcher(**options)
        assert "\n" not in str(error.value)


def test_chains_as_long_as_the_limits_allow_compile():
    """llguidance recurses along them, and a stack that is full ends the process."""
    chain = {f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}]} for i in range(990)}
    rules = "start: r0\n" + "".join(f'r{i}: "a" r{i + 1}\n' for i in range(2500)) + 'r2500: "b"'
    schema = {"$defs": {**chain, "d990": {"type": "null"}}, "$ref": "#/$defs/d0"}
    assert BYTES.matcher(json_schema=schema).can_begin
    assert BYTES.matcher(grammar=rules).can_begin


@pytest.mark.parametrize("options", [{"choices": ["Ω", "\n"]}, {"regex": "Ω|Z"}])
def test_a_text_that_the_vocabulary_cannot_begin_is_refused_at_the_call(options):
    with pytest.raises(InputError, match=f"no text can meet {next(iter(options))}"):
        CHARACTERS.matcher(**options)
    assert BYTES.matcher(**options).can_begin
    assert PIECES.matcher(**options).can_begin


def test_a_regex_never_leads_to_a_character_without_a_token():
    following = CHARACTERS.matcher(regex="aΩ|ab")
    following.follow(CHARACTERS.codec.encode("a"), 0)
    (allowed,) = np.flatnonzero(np.isfinite(following.masked(np.zeros(CHARACTERS.vocabulary.size))))
    assert CHARACTERS.codec.decode([int(allowed)]) == "b"


HUGE = [
    {"json_schema": {"properties": {f"key{i}": {"type": "string"} for i in range(1900)}}},
    {"json_schema": {"anyOf": [{"type": "object", "properties": {f"k{i}": {"type": "null"}}} for i in range(600)]}},
    {"json_schema": {"enum": list(range(100_000 // 7))}},
    {"json_schema": {"type": "string", "minLength": 10_000_000}},
    {"regex": "((a{1,1000}){1,1000}){1,1000}"},
    {"regex": "(.*a){50}.{300}"},
    {"regex": "(" * 20_000 + ")" * 20_000},
    {"grammar": "start: " + " | ".join(['"b"'] * 8_000)},
    {"grammar": "start: " + "(" * 20_000 + '"a"' + ")" * 20_000},
    {"choices": ["a" * (i % 40) + str(i) for i in range(10_000)]},
]


@pytest.mark.parametrize("options", HUGE, ids=range(len(HUGE)))
def test_a_huge_one_is_refused_or_begun_in_seconds(options):
    started = time.process_time()
    try:
        following = BYTES.matcher(**options)
        for place in range(3):
            allowed = np.flatnonzero(np.isfinite(following.masked(np.zeros(BYTES.vocabulary.size, np.float32))))
            following.follow([int(allowed[0])], -place)
    except InputError:
        pass
    assert time.process_time() - started < 20


def test_a_constraint_is_compiled_once(monkeypatch):
    """Each matcher begins anew."""
    import llguidance

    first = BYTES.matcher(regex="abc")
    monkeypatch.setattr(llguidance, "LLMatcher", None)
    first.follow(first.forced(9)[:1], 0)
    second = BYTES.matcher(regex="abc")
    assert second.forced(9) != first.forced(9)
    with pytest.raises(AttributeError):
        BYTES.matcher(regex="another")


def test_whitespace_is_json_dumps_unless_the_schema_says_otherwise():
    schema = {"const": {"a": [1, 2], "b": None}}
    compact = schema | {"x-guidance": {"item_separator": ",", "key_separator": ":", "whitespace_flexible": False}}
    for asked, expected in ((schema, json.dumps(schema["const"])), (compact, '{"a":[1,2],"b":null}')):
        following = BYTES.matcher(json_schema=asked)
        ids = following.forced(99)
        following.follow(ids, 0)
        assert BYTES.codec.decode(ids) == expected
        assert following.complete


def test_without_the_library_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(MissingExtraError, match=r"pip install '\.\[constrained\]'"):
        vocabularies.vocabulary_of(vocabularies.byte_level())
