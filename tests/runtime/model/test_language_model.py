from __future__ import annotations

import dataclasses
import inspect
import shutil
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models

import pastkey
from pastkey.contract import names
from pastkey.errors import InputError, IntegrityError, MissingFileError, OptionError
from pastkey.runtime import ChatOptions, load
from pastkey.runtime.model.generation_config import sampling_defaults
from pastkey.runtime.settings import CHAT_OPTIONS, GENERATE_OPTIONS, SESSION_OPTIONS


def test_generate_continues_a_text(lm, tiny, letters):
    expected = tiny.greedy(letters.encode("once upon").ids, 12)
    completion = lm.generate("once upon", max_new_tokens=12)
    assert (completion.ids, completion.text) == (expected, letters.decode(expected))
    assert (completion.finish_reason, completion.prompt_tokens, completion.new_tokens) == ("length", 9, 12)
    assert min(completion.prefill_seconds, completion.decode_seconds) > 0


def test_a_stop_string_ends_the_text_before_it(lm):
    text = lm.generate("abc", max_new_tokens=30).text
    stop = text[5:8]
    for given in (["~", stop], stop):
        completion = lm.generate("abc", max_new_tokens=30, stop=given)
        assert (completion.text, completion.finish_reason) == (text[: text.index(stop)], "stop_string")
        assert completion.new_tokens == len(completion.ids) < 30


def test_text_held_back_for_a_stop_string_comes_at_the_end(lm):
    text = lm.generate("abc", max_new_tokens=10).text
    completion = lm.generate("abc", max_new_tokens=10, stop=text[-2:] + "~")
    assert (completion.text, completion.finish_reason) == (text, "length")
    assert "".join(chunk.text for chunk in lm.stream("abc", max_new_tokens=10, stop=text[-2:] + "~")) == text


@pytest.mark.parametrize("ids", [np.array([1, 2], np.uint8), np.array([1, 2], np.int32), range(1, 3), iter([1, 2])])
def test_ids_of_any_kind_are_taken(lm, ids):
    found = lm.generate(ids, max_new_tokens=3).ids
    assert found == lm.generate([1, 2], max_new_tokens=3).ids
    assert all(type(token) is int for token in found)


MISSPELT = {
    "temprature": r"did you mean 'temperature'\?$",
    "x": r"docs/output\.md",
    "stop_token_id": r"did you mean 'stop_token_ids'\?",
}


@pytest.mark.parametrize("option", MISSPELT)
def test_a_misspelt_option_is_named_with_its_call(byte_model, option):
    chat = byte_model.chat()
    for name, call in (("generate", byte_model.generate), ("chat.ask", chat.ask), ("chat.stream", chat.stream)):
        with pytest.raises(OptionError, match=rf"^{name}\(\) has no option '{option}'; {MISSPELT[option]}"):
            call("?", **{option: 1})
    with pytest.raises(OptionError, match=r"has no option 'n'; docs/output\.md"):
        byte_model.stream("?", n=2)


def test_none_is_not_set_in_every_option(byte_model, speaking_bundle):
    every, chats, going = (dict.fromkeys(names) for names in (GENERATE_OPTIONS, CHAT_OPTIONS, SESSION_OPTIONS))
    expected = byte_model.generate("a").ids
    assert byte_model.generate("a", **every).ids == expected
    chat = byte_model.chat(None, messages=None, template=None, tools=None, documents=None, special_tokens_as_text=None)
    assert chat.ask("?", **chats).ids == byte_model.chat().ask("?").ids
    session = byte_model.session()
    session.append("a", context_overflow=None, num_sink_tokens=None)
    assert session.generate(**going).ids == expected
    arguments: dict[str, Any] = dict.fromkeys(set(inspect.signature(load).parameters) - {"path", "trust"})
    with load(speaking_bundle.path, **arguments) as model:
        assert model.max_batch > 1
        assert not pastkey.Generator(model.bundle.path, exact=None, max_batch=None, seed=None).exact


# --- characters of several tokens ---------------------------------------------------------------------------------
MANY_BYTES = "a日é🙂."


@pytest.fixture(scope="module")
def byte_model(tiny, make_bundle):
    """Says MANY_BYTES after a prompt of one token, a token for each byte, and ends; it also has a chat template."""
    said = [f"<0x{byte:02X}>" for byte in MANY_BYTES.encode()] + ["<end>"]
    pieces = sorted({*said, f"<0x{ord('?'):02X}>"})
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken("<end>", special=True)])
    script = [pieces.index(piece) for piece in said]
    config = {"chat_template": "{% for m in messages %}{{ '?' if m.role == 'user' }}{% endfor %}"}
    fields = {"tokenizer": tokenizer, "tokenizer_config": config, "eos_token_ids": (script[-1],)}
    return load(make_bundle(tiny.saying(script), "fused", **fields).path, threads=1)


@pytest.mark.parametrize("count", range(len(MANY_BYTES.encode()) + 2))
def test_a_text_that_ends_by_length_inside_a_character_ends_before_it(byte_model, count):
    data = MANY_BYTES.encode()
    expected = data[:count].decode("utf-8", "ignore")
    completion = byte_model.generate([0], max_new_tokens=count)
    assert completion.text == expected
    assert len(completion.ids) == completion.new_tokens == min(count, len(data))  # which tell the rest
    assert completion.finish_reason == ("length" if count <= len(data) else "stop")
    assert "".join(chunk.text for chunk in byte_model.stream([0], max_new_tokens=count)) == expected
    chat = byte_model.chat()
    assert chat.ask("?", max_new_tokens=count).text == chat.messages[-1]["content"] == expected


def test_a_text_that_ends_at_a_stop_string_inside_a_character_ends_before_it(byte_model):
    completion = byte_model.generate([0], stop="日")
    assert (completion.text, completion.finish_reason) == ("a", "stop_string")


def test_end_ids_of_ones_own_replace_those_of_the_bundle_or_stand_beside_them(lm, tiny, letters, make_bundle):
    drawn: dict[str, Any] = {"max_new_tokens": 30, "temperature": 2.0, "seed": 1}
    free = lm.generate("abc", **drawn)
    first, second = [token for i, token in enumerate(free.ids) if i > 0 and token not in free.ids[:i]][:2]
    ending = load(make_bundle(tiny, "fused", tokenizer=letters, eos_token_ids=(second,)).path, threads=1)
    to_first, to_second = (free.ids[: free.ids.index(end)] for end in (first, second))
    for options, ids, reason in (
        ({}, to_second, "stop"),
        ({"stop_token_ids": []}, to_second, "stop"),
        ({"stop_token_ids": np.array([first])}, to_first, "stop"),
        ({"eos_token_id": first}, to_first, "stop"),
        ({"eos_token_id": [second, first]}, to_first, "stop"),
        ({"eos_token_id": []}, free.ids, "length"),
        ({"eos_token_id": [], "stop_token_ids": [second]}, to_second, "stop"),
    ):
        completion = ending.generate("abc", **drawn, **options)
        assert (completion.ids, completion.finish_reason) == (ids, reason), options
    assert first not in ending.generate("abc", **drawn, eos_token_id=first, min_new_tokens=30).ids


def test_a_damaged_bundle_is_refused_before_it_is_opened(speaking_bundle, tmp_path):
    shutil.copytree(speaking_bundle.path, tmp_path / "b")
    graph = tmp_path / "b" / names.LAST_LOGITS_GRAPH
    graph.write_bytes(graph.read_bytes()[:-1] + b"?")
    with pytest.raises(IntegrityError, match=r"pastkey\.onnx was altered"):
        load(tmp_path / "b", verify=True)
    with pytest.raises(MissingFileError, match="no such bundle"):
        load(tmp_path / "none")


REFUSED: list[tuple[Any, str]] = [
    ([], "the prompt is empty"),
    ([1, "a"], "the prompt holds 'a'; token ids are whole numbers from 0 to"),
    ([1, [2]], r"the prompt holds \[2\]; token ids"),
    ([1, 2.5], r"the prompt holds 2\.5; token ids"),
    ([1, None], "the prompt holds None; token ids"),
    ([10**30], "token id"),
    ("a" * 700, "the prompt has 700 tokens; the context is 600"),
]


@pytest.mark.parametrize(("prompt", "words"), REFUSED)
def test_what_is_no_prompt_is_refused(lm, prompt, words):
    with pytest.raises(InputError, match=words):
        lm.generate(prompt)


def test_logits_of_no_tokens_are_refused(lm):
    with pytest.raises(InputError, match=r"shape \(T,\), at least one; found .* of shape \(0,\)"):
        lm.logits([])


# --- the sampling that a model's authors name -------------------------------------------------------------------------
ALL = {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "min_p": 0.05, "repetition_penalty": 1.05}
COUNTS: list[tuple[dict[str, Any], dict[str, float]]] = [  # generation_config.json, and the fields of it that count
    ({}, {}),
    ({"do_sample": True}, {"temperature": 1.0}),
    ({"do_sample": True, **ALL}, ALL),
    ({"do_sample": True, "temperature": 0.7, "top_k": None, "top_p": 1.0}, {"temperature": 0.7}),
    ({"temperature": 0.7, "top_k": 20}, {}),
    ({"do_sample": False, "temperature": 0.7, "repetition_penalty": 1.2}, {"repetition_penalty": 1.2}),
    ({"eos_token_id": 3, "max_length": 40, "num_beams": 4}, {}),
]


@pytest.mark.parametrize(("found", "expected"), COUNTS)
def test_what_counts(tiny, make_bundle, found, expected):
    bundle = make_bundle(tiny, "fused", generation_config=found)
    assert sampling_defaults(bundle) == expected
    unlisted = dataclasses.replace(bundle, manifest=dataclasses.replace(bundle.manifest, files={}))
    assert sampling_defaults(unlisted) == {}


def test_the_library_uses_them_on_request_only(tiny, make_bundle):
    found = {"do_sample": True, "temperature": 3.0}
    model = load(make_bundle(tiny, "fused", generation_config=found).path, threads=1)
    assert model.sampling_defaults == {"temperature": 3.0}
    greedy = model.generate([1, 2, 3], max_new_tokens=20)
    options: ChatOptions = {**model.sampling_defaults, "max_new_tokens": 20, "seed": 1}
    drawn = model.generate([1, 2, 3], **options)
    assert drawn.ids == model.generate([1, 2, 3], max_new_tokens=20, seed=1, temperature=3.0).ids != greedy.ids


@pytest.mark.parametrize(("name", "value"), [("temperature", "hot"), ("top_p", 2), ("repetition_penalty", 0)])
def test_a_value_out_of_range_is_told(tiny, make_bundle, name, value):
    bundle = make_bundle(tiny, "fused", generation_config={"do_sample": True, name: value})
    with pytest.raises(IntegrityError, match=rf"generation_config\.json is not valid: {name} is {value!r}"):
        sampling_defaults(bundle)
