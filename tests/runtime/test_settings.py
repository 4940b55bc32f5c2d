"""Options: declared, explained and typed in a command alike; a wrong type of one is refused, or is a TypeError."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pastkey
from pastkey.errors import InputError
from pastkey.runtime import Engine, LanguageModel, Limits, Request, Session, load
from pastkey.runtime.commands.flags import SAMPLING
from pastkey.runtime.model.signature import sign_bundle
from pastkey.runtime.settings import (
    _VALID,
    CHAT_OPTIONS,
    GENERATE_OPTIONS,
    GenerateOptions,
    PlacementOptions,
    SamplingConfig,
    SamplingOptions,
    require_valid,
)

from .conftest import E, Tiny

# What a command line has no flag for, and why.
UNTYPED = {
    "dry_sequence_breakers": "texts with newlines, or lists of ids",
    "logit_bias": "a mapping",
    "bad_words_ids": "lists of ids: --bad-word takes texts",
    "forced_decoder_ids": "pairs",
    "forced_eos_token_id": "a chat and a text end by themselves or at once",
    "logits_processor": "a function",
}

FIELDS = {field.name for field in dataclasses.fields(SamplingConfig)}


def test_every_field_of_a_sampler_is_an_option_and_a_flag():
    assert FIELDS
    assert FIELDS <= CHAT_OPTIONS
    assert SAMPLING.keys() == FIELDS - UNTYPED.keys()
    assert UNTYPED.keys() <= FIELDS
    assert SamplingOptions.__optional_keys__ == FIELDS


def test_every_option_is_explained():
    explained = re.findall(r"^ *- `(\w+)` \(", GenerateOptions.__doc__ or "", re.MULTILINE)
    assert sorted(explained) == sorted(GENERATE_OPTIONS)


# --- types ------------------------------------------------------------------------------------------------------------
SWITCH: tuple[Any, ...] = ("no", 1, np.bool_(True), [])
WHOLE: tuple[Any, ...] = (True, 1.5, "1", -2, np.array([1]))
NUMBER: tuple[Any, ...] = (True, "1", float("nan"), 1j)
TEXT: tuple[Any, ...] = (b"a", 1, ["a", 1], {"a": 1})
TEXTS: tuple[Any, ...] = ("", [""], [1], b"a", {"a": 1})
IDS: tuple[Any, ...] = ("ab", b"ab", {1: 2}, [True], [1.5], [-1], 1.5)

# Options, and values that Python would take for it in silence, and values out of its range.
WRONG: list[tuple[str, tuple[Any, ...]]] = [
    ("allow_fallback native verify prompt_logprobs prompt_lookup draft reuse_prefix exact", SWITCH),
    ("keep_special_tokens normalize special_tokens_as_text", SWITCH),
    ("max_memory prefix_bytes max_batch max_queue chunk_size n max_new_tokens logprobs", WHOLE),
    ("num_sink_tokens top_k seed", WHOLE),
    ("penalty_last_n no_repeat_ngram_size dry_allowed_length dry_penalty_last_n min_new_tokens", WHOLE),
    ("forced_eos_token_id", WHOLE),
    ("threads length", (True, 1.5, "1")),
    ("ids", ("ab", b"ab", {1: 2}, 1)),
    ("timeout temperature top_p min_p repetition_penalty typical_p top_n_sigma xtc_probability", NUMBER),
    ("xtc_threshold presence_penalty frequency_penalty dry_multiplier dry_base", NUMBER),
    ("adapter regex grammar system name call_id context_overflow pooling", TEXT),
    ("adapters", (["sql"], "sql", {1: "sql"})),
    ("stop bad_words", TEXTS),
    ("choices", (*TEXTS, "ab", [])),
    ("eos_token_id", (*IDS, True)),
    ("stop_token_ids suppress_tokens", (*IDS, 1)),
    ("bad_words_ids", (*IDS, [[]], [[1.5]], [[1], "ab"])),
    ("dry_sequence_breakers", (*IDS, [[]], [[1.5]], [""])),
    ("forced_decoder_ids", (*IDS, [[1]], [[1, 2.5]])),
    ("providers", ({"cpu": {}}, b"cpu")),
    ("session_options", ("logid", [("logid", "a")], {1: "a"})),
    ("documents", ({"title": "a"}, "a", ["a"])),
    ("logit_bias", ([1], {True: 1}, {1: "a"}, {1.5: 1})),
    ("logits_processor", (1, "a", [None])),
]
CASES = {name: values for names, values in WRONG for name in names.split()}


def test_every_option_has_a_row_and_wrong_values():
    assert CASES.keys() == _VALID.keys()
    named = GENERATE_OPTIONS | PlacementOptions.__optional_keys__
    assert named - _VALID.keys() == {"json_schema"}  # a schema is read and bounded by constraints/


@pytest.mark.parametrize("name", CASES)
def test_values_of_a_wrong_type_or_range_are_refused(name):
    for value in CASES[name]:
        with pytest.raises(InputError, match=f"^{name} is "):
            require_valid({name: value})
    require_valid({name: None, "another": object()})


@dataclass
class World:
    """A model with a session and a conversation."""

    lm: LanguageModel
    session: Session
    folder: Path

    @property
    def bundle(self) -> Path:
        return self.lm.bundle.path

    def engine(self) -> Engine:
        engine = self.lm.parts.new_engine()
        engine.prefill([1, 2, 3])
        return engine

    def state(self) -> list[Any]:
        with self.session.fork() as fork:
            return [self.lm.generate("once upon", max_new_tokens=6).ids, fork.generate(max_new_tokens=6).ids]


@pytest.fixture(scope="module")
def world(letters, make_bundle, tmp_path_factory):
    template = "{% for m in messages %}{{ m.content }}.{% endfor %}"
    fields = {"tokenizer": letters, "hidden_size": E, "tokenizer_config": {"chat_template": template}}
    lm = load(make_bundle(Tiny.random([(8, 8), (16, 16)], context_length=48), "fused", **fields).path, threads=1)
    session = lm.session()
    session.append("once upon")
    return World(lm, session, tmp_path_factory.mktemp("files"))


Call = Callable[[World, Any], Any]

# Where a parameter is checked: the call, the key word of the error, and values.
REFUSED: list[tuple[Call, str, tuple[Any, ...]]] = [
    (lambda w, x: load(w.bundle, allow_fallback=x), "allow_fallback", SWITCH),
    (lambda w, x: load(w.bundle, providers=x), "providers", ({"cpu": {}},)),
    (lambda w, x: load(w.bundle, session_options={"logid": x}), "logid", (1, [1], 2.5)),
    (lambda w, x: load(x), "path", ("a\0b", "/" + "b" * 5000)),
    (lambda w, x: Engine(w.lm.bundle, threads=x), "threads", (True, 1.5)),
    (lambda w, x: Limits(memory=x), "memory", WHOLE),
    (lambda w, x: SamplingConfig(top_k=x), "top_k", WHOLE),
    (lambda w, x: Request([1], max_new_tokens=x), "max_new_tokens", WHOLE),
    (lambda w, x: w.lm.generate(x), "prompt", (b"ab", bytearray(b"ab"), {1: 2}, {1}, [True], [1.5], [b"a"])),
    (lambda w, x: w.lm.generate("a", n=x), "^n is", WHOLE),
    (lambda w, x: w.lm.generate("a", exact=x), "exact", SWITCH),
    (lambda w, x: w.lm.stream_many(x), "prompts", ("ab", b"ab", {"a": 1}, {"a"}, [], iter("a"))),
    (lambda w, x: w.lm.agenerate("a", seed=x).send(None), "seed", WHOLE),
    (lambda w, x: w.lm.logits(x), "token ids", ("ab", b"ab", {1: 2}, {1}, [True], [1.5], [[1]])),
    (lambda w, x: w.lm.score(x), "^text is", (b"ab", {1: 2}, ["a", "b"])),
    (lambda w, x: w.lm.stream(x), r"^prompt is .* all to generate\(\) or.* stream_many\(\)", (["a", "b"], [[1], [2]])),
    (lambda w, x: w.session.append(x), "^text is .* each alone", (["a", "b"], [[1], [2]])),
    (lambda w, x: w.lm.embed("a", normalize=x), "normalize", SWITCH),
    (lambda w, x: w.lm.memory.estimate(x), "tokens", WHOLE),
    (lambda w, x: w.session.append("a", num_sink_tokens=x), "num_sink_tokens", WHOLE),
    (lambda w, x: w.session.generate("a", prompt_lookup=x), "prompt_lookup", SWITCH),
    (lambda w, x: w.session.trim(x), "trimmed", WHOLE),
    (lambda w, x: w.lm.chat(x), "system", TEXT),
    (lambda w, x: w.lm.chat(messages=x), "message", ("ab", [1], [{"role": 1}], [{"role": "user", "content": b"a"}])),
    (lambda w, x: w.lm.chat(tools=x), "tool", ("ab", {"type": "function"}, [1])),
    (lambda w, x: w.lm.chat().ask(x), "message", (b"ab", 1, ["a"], {"type": "text"})),
    (lambda w, x: w.lm.chat().ask("a", keep_special_tokens=x), "keep_special_tokens", SWITCH),
    (lambda w, x: w.lm.chat().set_system(x), "system", TEXT),
    (lambda w, x: w.lm.chat().add_tool_result("a", name=x), "name", TEXT),
    (lambda w, x: w.engine().prefill([1, 2], chunk_size=x), "chunk_size", WHOLE),
    (lambda w, x: w.engine().keep_prefix(x), "ids", ("ab", b"ab", {1: 2}, 1)),
    (lambda w, x: w.engine().trim(x), "length|trimmed", WHOLE),
    (lambda w, x: pastkey.Generator(w.bundle, exact=x), "exact", SWITCH),
    (lambda w, x: pastkey.Generator(w.bundle, threads=1)({"prompt": x}), "prompt", ("ab", b"ab", {"a": 1}, 1)),
]
# Where a wrong type is a TypeError: the call, the beginning of the error, and values.
TYPE_ERRORS: list[tuple[Call, str, tuple[Any, ...]]] = [
    (lambda w, x: load(x), "path is", (None, 1, ["a"])),
    (lambda w, x: load(w.bundle, key=x), "key is", (1, b"secret")),
    (lambda w, x: load(w.bundle, providers=[x]), "", (1, None)),
    (lambda w, x: sign_bundle(w.bundle, x), "key is", (None, 1, b"a")),
    (lambda w, x: w.lm.generate(x), "prompt is", (None, 1, 1.5, np.array(3))),
    (lambda w, x: w.lm.generate(x, n=2), "prompt is", (None, 1)),
    (lambda w, x: w.lm.stream(x), "prompt is", (None, 1)),
    (lambda w, x: w.lm.score(x), "text is", (None, 3)),
    (lambda w, x: w.lm.embed(x), "text is", (None, 3)),
    (lambda w, x: w.lm.load_session(x), "path is", (None, 3)),
    (lambda w, x: w.lm.generate(["a", "b"], x, max_new_tokens=1), "", (1, "a")),
    (lambda w, x: w.lm.chat(messages=x), "messages is", (1, 1.5)),
    (lambda w, x: w.lm.generate_chat(x), "messages is", (None, 1)),
    (lambda w, x: w.lm.chat().save(x), "path is", (None, 1, b"a")),
    (lambda w, x: w.session.append(x), "text is", (None, 1)),
    (lambda w, x: w.session.generate(x), "text is", (None, 1)),
    (lambda w, x: pastkey.Generator(w.bundle, threads=1)(x), "", (None, 1, "ab")),
]


@pytest.mark.parametrize(
    ("error", "call", "word", "values"),
    [(InputError, *row) for row in REFUSED]
    + [(TypeError, call, f"^{word}", values) for call, word, values in TYPE_ERRORS],
)
def test_a_wrong_type_is_refused_and_changes_nothing(world, error, call, word, values):
    expected = world.state()
    for value in values:
        with pytest.raises(error, match=word):
            call(world, value)
    assert world.state() == expected
    assert world.lm.scheduler.live == 0
