"""Constraints in whole generations, over the tiny decoder."""

import json
import re

import pytest

pytest.importorskip("llguidance")
jsonschema = pytest.importorskip("jsonschema")

from pastkey.errors import InputError
from pastkey.runtime import load
from pastkey.runtime.constraints.lazy import LazyVocabulary
from pastkey.runtime.constraints.vocabulary import Vocabulary
from pastkey.runtime.text.codec import TextCodec

from .vocabularies import characters

# The parts of JSON: 36 tokens and one id that is none, as many as the tiny decoder has.
LETTERS = [*'{}[]":, -.0123456789aeflnrstuyé', '{"', '": ', '", "', "tr"]


@pytest.fixture(scope="module", params=["fused", "standard"])
def lm(request, tiny, make_bundle):
    return load(make_bundle(tiny, request.param, tokenizer=characters(LETTERS), eos_token_ids=(0,)).path)


SCHEMA = {
    "type": "object",
    "properties": {
        "a": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 3},
        "tees": {"enum": ["t", "tt", "es"]},
        "return": {"type": ["boolean", "null"]},
    },
    "required": ["a", "tees", "return"],
    "additionalProperties": False,
}
SAMPLED = {"temperature": 1.5, "max_new_tokens": 200}
SEVERAL = {"top_n_sigma": 1.0, "typical_p": 0.9, "repetition_penalty": 1.3, "top_p": 0.9, "min_p": 0.1}


@pytest.mark.parametrize("options", [{}, {"temperature": 0.0}, {"logprobs": 2}, {"temperature": 2.0, **SEVERAL}])
def test_sampled_output_validates(lm, options):
    for seed in range(8):
        done = lm.generate("ta", json_schema=SCHEMA, seed=seed, **SAMPLED | options)
        assert (done.finish_reason, done.new_tokens) == ("stop", len(done.ids))
        if "logprobs" in options:  # each token is chosen
            assert (done.forced_tokens, len(done.logprobs)) == (0, len(done.ids))
        else:
            assert done.forced_tokens > 20
        jsonschema.validate(json.loads(done.text), SCHEMA)


def test_stop_strings_limits_and_bans_with_a_constraint(lm):
    (a,) = lm.prompt_ids("a")
    for options in ({"forced_decoder_ids": [[0, a + 2]]}, {"suppress_tokens": lm.prompt_ids("ae")}):
        with pytest.raises(InputError, match=r"no allowed token|ban every token"):
            lm.generate("ta", regex="[ae]", **options)
    done = lm.generate("ta", json_schema=SCHEMA, stop="ees", max_new_tokens=200)
    assert (done.finish_reason, done.stop_string) == ("stop_string", "ees")
    assert done.text.endswith('"t')
    whole = lm.generate("ta", json_schema=SCHEMA, max_new_tokens=200)
    for most in (0, 1, 7, whole.new_tokens - 1, whole.new_tokens):
        cut = lm.generate("ta", json_schema=SCHEMA, max_new_tokens=most)
        assert (cut.ids, cut.finish_reason) == (whole.ids[:most], "stop" if cut.ids == whole.ids else "length")


def test_a_constraint_that_takes_no_text_is_met_at_once(lm, speaking_bundle):
    assert lm.generate("ta", regex="a{0}", min_new_tokens=2).finish_reason == "stop"
    without_eos = load(speaking_bundle.path, threads=1)
    for regex, text in (("a{0}", ""), ("a{2,3}", "aaa")):
        done = without_eos.generate("abc", regex=regex)
        assert (done.text, done.finish_reason) == (text, "stop")


def test_an_end_id_of_ones_own_ends_a_text_that_is_held(lm):
    true, dot = (lm.tokenizer.encode(letter)[0] for letter in "t.")
    for regex in ("a\\.t", "[0-9][.]t"):  # where it is forced and where it is chosen
        whole = lm.generate("ta", regex=regex)
        assert (len(whole.ids), whole.finish_reason) == (3, "stop")
        cut = lm.generate("ta", regex=regex, stop_token_ids=[dot])
        assert (cut.ids, cut.finish_reason) == (whole.ids[:1], "stop")
    # An end of the text's own may follow where the constraint is met, and the bundle's no more.
    for own, end, expected in ((true, true, ("a", "stop")), ([], 0, ("a" * 20, "length"))):
        held = lm.generate("ta", regex="a+", eos_token_id=own, max_new_tokens=20, logit_bias={end: 999.0})
        assert (held.text, held.finish_reason) == expected


def test_forced_tokens_of_a_stream_are_run_together(lm):
    whole = lm.generate("ta", json_schema=SCHEMA, seed=3, **SAMPLED)
    before = lm.scheduler.steps
    chunks = list(lm.stream("ta", json_schema=SCHEMA, seed=3, **SAMPLED))
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert [token for chunk in chunks for token in chunk.ids] == whole.ids
    assert lm.scheduler.steps - before < whole.new_tokens - whole.forced_tokens + 5


def test_the_logits_behind_forced_tokens_are_those_of_the_text(lm):
    """The greedy text is that of a loop over uncached logits with the same masks."""
    done = lm.generate("ta", json_schema=SCHEMA, max_new_tokens=200)
    following = lm.vocabulary.matcher({"json_schema": SCHEMA})
    prompt = lm.prompt_ids("ta")
    ids = [*prompt]
    while not following.complete:
        forced = following.forced(99)
        ids += forced or [int(following.masked(lm.logits(ids)[-1]).argmax())]
        following.follow(ids, len(prompt))
    assert done.ids == ids[len(prompt) :]


def test_a_text_that_is_certain_needs_no_run(lm):
    before = lm.scheduler.steps
    for options in ({"choices": ["return"]}, {"json_schema": {"const": [1, 2]}}, {"regex": "aaa"}):
        done = lm.generate("ta", reuse_prefix=True, **options)
        assert (done.finish_reason, done.forced_tokens) == ("stop", done.new_tokens)
    assert done.text == "aaa"
    assert lm.scheduler.steps - before <= 6
    assert lm.generate("ta", reuse_prefix=True, max_new_tokens=3).text == lm.generate("ta", max_new_tokens=3).text


def test_a_batch_of_constraints_is_as_each_alone(lm):
    prompts = ["ta", "tr", "{", "te"]
    together = lm.generate(prompts, json_schema=SCHEMA, seed=3, **SAMPLED)
    alone = [lm.generate(prompt, json_schema=SCHEMA, seed=3, **SAMPLED) for prompt in prompts]
    assert [done.text for done in together] == [done.text for done in alone]


def test_drafts_change_nothing(lm):
    given = {"prompt": "te ta es te ta es te ta es ", "regex": "(te |ta |es ){2,60}", "max_new_tokens": 120}
    done = lm.generate(**given)
    assert done.text == lm.generate(**given, prompt_lookup=False).text
    assert re.fullmatch("(te |ta |es )+", done.text)


def test_wrong_ones_are_told_by_the_call(lm):
    before = lm.scheduler.steps
    for call in (lm.generate, lm.stream, lm.session().stream):
        with pytest.raises(InputError, match="regex cannot be followed"):
            call("ta", regex="(")
        with pytest.raises(InputError, match="no text can meet regex"):
            call("ta", regex="Z")
    assert lm.scheduler.steps == before


def test_a_dead_end_of_a_grammar_is_an_error(lm):
    with pytest.raises(InputError, match="where this model's vocabulary cannot continue"):
        lm.generate("ta", grammar='start: /[a]/ b\nb: "Z"')
    assert lm.generate("ta", regex="[a]").text == "a"


def test_the_vocabulary_is_read_once_and_a_bundle_without_tokenizer_has_none(monkeypatch):
    vocabulary = LazyVocabulary(TextCodec(characters(LETTERS)), 37, (0,))
    vocabulary.matcher({"regex": "a"})
    monkeypatch.setattr(Vocabulary, "of", None)
    vocabulary.matcher({"regex": "e"})
    vocabulary = LazyVocabulary(None, 9, ())
    assert vocabulary.matcher({"seed": 3}) is None
    with pytest.raises(InputError, match="this bundle has no tokenizer"):
        vocabulary.matcher({"regex": "a"})
