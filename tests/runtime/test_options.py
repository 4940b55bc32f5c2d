"""Options: one table, from which come checks, flags, help and the docs; a wrong type is refused, or is a TypeError."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import pytest

import pastkey
from pastkey.errors import InputError
from pastkey.runtime import Engine, LanguageModel, Limits, Session, load
from pastkey.runtime.commands.flags import add_generation
from pastkey.runtime.model.signature import sign_bundle
from pastkey.runtime.options import CHECKED, DEFAULTS, OPTIONS, PlacementOptions, require_valid
from pastkey.runtime.settings import CHAT_OPTIONS, GenerateOptions, SamplingConfig, SamplingOptions

from .tiny_decoder import E, Tiny

FIELDS = {field.name: field.default for field in dataclasses.fields(SamplingConfig)}


def described(kind: Any) -> str:
    """Writes a type in words: "list of int"."""
    origin, given = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return described(given[0])
    if origin is Literal:
        return " or ".join(f'"{value}"' for value in given)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(described, given))
    if origin is Sequence:
        return f"list of {described(given[0])}"
    if origin is Mapping:
        return f"mapping of {described(given[0])} to {described(given[1])}"
    if origin is Callable:
        return "function"
    return "class" if origin is type else str(kind.__name__)


def table() -> str:
    """The options of a text as a table in Markdown, which docs/output.md has."""
    lines = ["| option | type | default | what it does |", "|---|---|---|---|"]
    group = ""
    for option in OPTIONS.values():
        if option.group != group:
            group = option.group
            lines.append(f"| **{group}** | | | |")
        default = "" if option.default in (None, ()) else f"`{option.default!r}`"
        lines.append(f"| `{option.name}` | {described(option.kind)} | {default} | {option.help} |")
    return "\n".join(lines) + "\n"


def test_the_types_are_those_of_the_table():
    kinds = {name: option.kind | None for name, option in OPTIONS.items()}
    held = typing.get_type_hints(type("Kinds", (), {"__annotations__": kinds}))  # without the ranges
    assert held == typing.get_type_hints(GenerateOptions)
    assert {name: DEFAULTS[name] for name in SamplingOptions.__optional_keys__} == FIELDS
    assert FIELDS.keys() <= CHAT_OPTIONS


def test_a_default_is_valid():
    for option in OPTIONS.values():
        assert option.default is None or option.valid(option.default), option.name


def test_help_lists_the_options():
    for call in (LanguageModel.generate, LanguageModel.stream, LanguageModel.astream_many):
        parameters = inspect.signature(call).parameters
        assert {name: parameters[name].default for name in OPTIONS} == DEFAULTS
        assert f"- top_k: {OPTIONS['top_k'].help}" in (inspect.getdoc(call) or "")
    assert "reuse_prefix" not in inspect.signature(Session.generate).parameters
    assert "tool_choice" in inspect.signature(LanguageModel.stream_chat).parameters


# --- flags ------------------------------------------------------------------------------------------------------------
def parsed(*words: str) -> dict[str, Any]:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_generation(parser)
    return {name: value for name, value in vars(parser.parse_args(words)).items() if value is not None}


# A value of each kind of option, as a flag has it.
WRITTEN: tuple[tuple[str, tuple[str, ...], Any], ...] = (
    ("top_k", ("--top-k", "3"), 3),
    ("top_n_sigma", ("--top-n-sigma=-1e-3",), -0.001),
    ("suppress_tokens", ("--suppress-tokens", "1, 2,,3"), [1, 2, 3]),
    ("eos_token_id", ("--eos-token-id", "7,8"), [7, 8]),
    ("stop", ("--stop", "a", "--stop", "b c"), ["a", "b c"]),
    ("choices", ("--choice", "a", "--choice", "b"), ["a", "b"]),
    ("bad_words", ("--bad-word", "a"), ["a"]),
    ("prompt_lookup", ("--no-prompt-lookup",), False),
    ("keep_special_tokens", ("--keep-special-tokens",), True),
    ("context_overflow", ("--context-overflow", "shift"), "shift"),
    ("json_schema", ("--json-schema", "schema.json"), "schema.json"),
)


@pytest.mark.parametrize(("name", "words", "value"), WRITTEN)
def test_a_flag_is_read(name, words, value):
    assert parsed(*words) == {name: value}
    assert parsed() == {}


@pytest.mark.parametrize("value", ["hot", "-1", "nan", "1e99"])
def test_a_flag_refuses_what_the_option_refuses(value):
    with pytest.raises(argparse.ArgumentError) as caught:
        parsed(f"--temperature={value}")
    expected = OPTIONS["temperature"].expected
    assert str(caught.value) == f"argument --temperature: {value!r} was given; it must be {expected}"


# --- types ------------------------------------------------------------------------------------------------------------
SWITCH: tuple[Any, ...] = ("no", 1, np.bool_(True), [])
WHOLE: tuple[Any, ...] = (True, 1.5, "1", -2, np.array([1]))
NUMBER: tuple[Any, ...] = (True, "1", float("nan"), 1j)
TEXT: tuple[Any, ...] = (b"a", 1, ["a", 1], {"a": 1})
TEXTS: tuple[Any, ...] = ("", [""], [1], b"a", {"a": 1})
IDS: tuple[Any, ...] = ("ab", b"ab", {1: 2}, [True], [1.5], [-1], 1.5)

# Options, and values that Python would silently accept for it, and values out of its range.
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
    ("json_schema", (1, int, dict, [1], object())),
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
# Values of its type that are out of its range.
BEYOND: dict[str, tuple[Any, ...]] = {
    "temperature": (-0.1, np.inf, 1e39), "top_p": (0.0, 1.01, 1e-50), "min_p": (-0.1, 1.1),
    "repetition_penalty": (0.0, 1e-50), "seed": (-1, 2**63), "typical_p": (0.0, 1.1), "xtc_probability": (1.1,),
    "xtc_threshold": (-0.1,), "presence_penalty": (np.inf,), "dry_multiplier": (-1,), "dry_base": (0.9,),
    "dry_sequence_breakers": ([[-1]],), "logit_bias": ({-1: 0.5}, {1: np.nan}, {1: np.inf}), "timeout": (0, -1),
    "forced_decoder_ids": ([(1,)], [(-1, 2)]), "n": (0, 10_001), "max_batch": (0,),
}  # fmt: skip
CASES = {name: (*values, *BEYOND.get(name, ())) for names, values in WRONG for name in names.split()}


def test_every_option_has_wrong_values():
    assert CASES.keys() == CHECKED.keys()
    assert PlacementOptions.__optional_keys__ <= CHECKED.keys()


@pytest.mark.parametrize("name", CASES)
def test_values_of_a_wrong_type_or_range_are_refused(name):
    for value in CASES[name]:
        with pytest.raises(InputError, match=f"^{name} is ") as caught:
            require_valid({name: value})
        assert caught.value.option == name
    require_valid({name: None, "another": object()})


def test_numbers_of_numpy_are_numbers():
    require_valid({"temperature": np.float32(0.5), "top_k": np.int64(3), "suppress_tokens": np.array([1, 2])})
    require_valid({"logit_bias": {np.int64(3): -np.inf}, "stop": "a", "eos_token_id": [], "bad_words_ids": [(1, 2)]})


@pytest.fixture(scope="module")
def world(letters, make_bundle):
    """A model with a session, and a new engine of it."""
    config = {"chat_template": "{% for m in messages %}{{ m.content }}.{% endfor %}"}
    fields = {"tokenizer": letters, "hidden_size": E, "tokenizer_config": config}
    bundle = make_bundle(Tiny.random([(8, 8), (16, 16)], context_length=48), "fused", **fields)
    lm = load(bundle.path, threads=1)
    session = lm.session()
    session.append("once upon")

    def engine() -> Engine:
        made = lm.parts.new_engine()
        made.prefill([1, 2, 3])
        return made

    return types.SimpleNamespace(lm=lm, session=session, bundle=bundle.path, engine=engine)


def state(world: Any) -> list[Any]:
    with world.session.fork() as fork:
        return [world.lm.generate("once upon", max_new_tokens=6).ids, fork.generate(max_new_tokens=6).ids]


Call = Callable[[Any, Any], Any]

# Where a parameter is checked: the call, the key word of the error, and values.
REFUSED: list[tuple[Call, str, tuple[Any, ...]]] = [
    (lambda w, x: load(w.bundle, allow_fallback=x), "allow_fallback", SWITCH),
    (lambda w, x: load(w.bundle, providers=x), "providers", ({"cpu": {}},)),
    (lambda w, x: load(w.bundle, session_options={"logid": x}), "logid", (1, [1], 2.5)),
    (lambda w, x: Engine(w.lm.bundle, threads=x), "threads", (True, 1.5)),
    (lambda w, x: Limits(memory=x), "memory", WHOLE),
    (lambda w, x: w.lm.generate(x), "prompt", (b"ab", bytearray(b"ab"), {1: 2}, {1}, [True], [1.5], [b"a"])),
    (lambda w, x: w.lm.generate("a", n=x), "^n is", WHOLE),
    (lambda w, x: w.lm.generate("a", exact=x), "exact", SWITCH),
    (lambda w, x: w.lm.stream_many(x), "prompts", ("ab", b"ab", {"a": 1}, {"a"}, [], iter("a"))),
    (lambda w, x: w.lm.agenerate("a", seed=x).send(None), "seed", WHOLE),
    (lambda w, x: w.lm.logits(x), "token ids", ("ab", b"ab", {1: 2}, {1}, [True], [1.5], [[1]])),
    (lambda w, x: w.lm.score(x), "^text is", (b"ab", {1: 2}, ["a", "b"])),
    (lambda w, x: w.lm.stream(x), r"^prompt is .* all to generate\(\) or.* stream_many\(\)", (["a", "b"], [[1], [2]])),
    (lambda w, x: w.session.append(x), "^text is .* each separately", (["a", "b"], [[1], [2]])),
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
    expected = state(world)
    for value in values:
        with pytest.raises(error, match=word):
            call(world, value)
    assert state(world) == expected
    assert world.lm.scheduler.live == 0
