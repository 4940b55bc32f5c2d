"""A generator answers each row as a call of its own would, whoever is beside it, in batches of lists and of arrays."""

from __future__ import annotations

import multiprocessing
import pickle
import random
import shutil
from typing import Any

import numpy as np
import pytest

import pastkey
from pastkey.errors import InputError, MissingExtraError, MissingFileError, OptionError
from pastkey.runtime import Completion, LanguageModel, Stream, load
from pastkey.runtime.bulk import generator as module
from pastkey.runtime.bulk.generator import Generator, as_python, as_text, told
from pastkey.runtime.bulk.rows import Row, seed_of
from pastkey.runtime.decoding.completion import completed
from pastkey.runtime.options import MAX_NEW_TOKENS
from pastkey.runtime.settings import CHAT_NEW_TOKENS

from ..conftest import TEMPLATE
from .rows import DRAWN, plain_rows

HI = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def model(talking):
    return load(talking, threads=1)


def alone(model: LanguageModel, rows: list[dict[str, Any]], **options: Any) -> list[str]:
    return [model.generate(row["prompt"], seed=seed_of(0, row["id"]), **{**DRAWN, **options}).text for row in rows]


def columns(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {name: [row[name] for row in rows] for name in rows[0]}


def answered(generator: Generator, *rows: Any) -> list[Any]:
    made = generator.answers(Row(place, place, row) for place, row in enumerate(rows))
    found = {row.number: answer for row, answer in made}
    return [found[place] for place in range(len(rows))]


@pytest.mark.parametrize("exact", [False, True])
def test_each_row_is_answered_as_by_a_call_of_its_own(talking, model, exact):
    rows = plain_rows(40)
    made = Generator(talking, threads=1, exact=exact, **DRAWN)(columns(rows))
    assert made["text"] == alone(model, rows)
    assert made["topic"] == columns(rows)["topic"]
    assert set(made["finish_reason"]) == {"length"}
    assert made["new_tokens"] == [12] * 40
    assert made["prompt_tokens"] == [len(row["prompt"]) for row in rows]
    assert made["error"] == [""] * 40
    assert len(set(made["text"])) > 30


def test_neither_order_nor_company_changes_a_row(talking):
    rows = plain_rows(30)
    generator = Generator(talking, threads=1, **DRAWN)
    whole = dict(zip(columns(rows)["id"], generator(columns(rows))["text"], strict=True))
    random.Random(0).shuffle(rows)
    for start in range(0, 30, 7):
        part = columns(rows[start : start + 7])
        assert generator(part)["text"] == [whole[identity] for identity in part["id"]]
    other = Generator(talking, threads=1, **{**DRAWN, "seed": 1})(columns(rows))
    assert other["text"] != [whole[row["id"]] for row in rows]


def test_what_neighbours_share_is_computed_once(talking, monkeypatch):
    generator = Generator(talking, threads=1, max_batch=2, max_new_tokens=2)
    cached: list[int] = []
    answer_of = module.answer_of

    def told(answer: Completion, **how: bool) -> dict[str, Any]:
        cached.append(answer.cached_tokens)
        return answer_of(answer, **how)

    monkeypatch.setattr(module, "answer_of", told)
    begin = "abcdefgh" * 6
    generator({"prompt": ["zz", *(begin + letter * 3 for letter in "abcdef"), "yy"]})
    assert sorted(cached) == [0, 0] + [len(begin)] * 6


def test_arrays_and_missing_values_are_as_lists_and_none(talking, model):
    generator = Generator(talking, threads=1, max_new_tokens=3)
    made = generator(
        {
            "id": np.array([1, 2, 3]),
            "prompt": np.array(["ab", "ab", "ab"], object),
            "max_new_tokens": np.array([2.0, np.nan, 5.0]),
        }
    )
    assert [bool(error) for error in made["error"]] == [True, False, True]  # 2.0 is no whole number
    assert (made["text"][0], made["finish_reason"][0], made["new_tokens"]) == ("", "", [0, 3, 0])
    whole = generator({"prompt": [np.array([1, 2]), [1, 2]], "max_new_tokens": np.array([4, 2])})
    assert whole["new_tokens"] == [4, 2]
    assert as_python({"a": np.array([[1, 2]]), "b": (np.float32(0.5), float("nan")), "c": np.int64(3)}) == {
        "a": [[1, 2]],
        "b": [0.5, None],
        "c": 3,
    }
    assert (as_text(None), as_text(["é"])) == (None, '["é"]')


def test_conversations_are_answered_as_by_the_chat(talking, model):
    longer = [*HI, {"role": "assistant", "content": "no"}, {"role": "user", "content": "so"}]
    cut = longer[:2]  # an answer that goes on
    made = Generator(talking, threads=1, **DRAWN)({"id": ["a", "b", "c"], "messages": [HI, longer, cut]})
    for identity, messages, text in zip("abc", (HI, longer, cut), made["text"], strict=True):
        chat = model.chat()
        chat.messages = messages
        prompt = model.chat_prompt(messages)
        answer = chat.ask(seed=seed_of(0, identity), **DRAWN)
        assert text == answer.text
        assert len(text) > 3
        (same,) = completed(model.stream_many([prompt], seed=seed_of(0, identity), **DRAWN))
        assert same.text == text


def test_a_bundle_that_was_exported_anew_is_talked_to_by_its_own_template(tiny, letters, make_bundle):
    """Also by a generator that another one, over the same model, has closed."""
    first, second = (
        make_bundle(tiny, "fused", tokenizer=letters, tokenizer_config={"chat_template": template}).path
        for template in (TEMPLATE, "abc")
    )
    one, other = (Generator(first, threads=1, max_new_tokens=2) for _ in range(2))
    assert one({"messages": [HI]})["prompt_tokens"] != [3]
    other.close()
    shutil.rmtree(first)
    second.rename(first)
    assert one({"messages": [HI]})["prompt_tokens"] == [3]


def test_tools_are_told_and_their_calls_are_read(tiny, letters, make_bundle):
    template = TEMPLATE.replace("<assistant>", "{{ tools[0].function.name if tools }}<assistant>")
    bundle = make_bundle(tiny, "fused", tokenizer=letters, tokenizer_config={"chat_template": template})
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    generator = Generator(bundle.path, threads=1, max_new_tokens=4)
    asked, plain = answered(generator, {"messages": HI, "tools": tools}, {"messages": HI})
    assert asked["prompt_tokens"] == plain["prompt_tokens"] + 1
    assert asked["tool_calls"] == []
    assert "tool_calls" not in plain
    table = generator({"messages": [HI, HI], "tools": [tools, None]})
    assert table["tool_calls"] == ["[]", ""]
    assert "logprobs" not in table
    assert len(Generator(bundle.path, threads=1, logprobs=0)({"prompt": ["a"]})["logprobs"]) == 1


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("no row", "no row"),
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": "a", "temperature": "hot"}, "temperature is 'hot'"),
        ({"prompt": [99]}, "out of range"),
        ({"prompt": "a", "regex": "[", "choices": ["a"]}, "were both given"),
    ],
)
def test_what_is_wrong_with_a_row_is_its_own_error(talking, row, words):
    before, bad, after = answered(Generator(talking, threads=1), {"prompt": "ab"}, row, {"prompt": "ab"})
    assert words in bad["error"]
    assert bad["text"] is None
    assert before == after
    assert before["error"] is None


def test_a_rows_settings_win_and_have_the_defaults_of_its_kind(talking):
    generator = Generator(talking, threads=1, regex="a*")
    options = generator._options
    parse = module.parse_request
    assert options(parse({"prompt": "a"}), 0)["max_new_tokens"] == MAX_NEW_TOKENS
    assert options(parse({"messages": HI}), 0)["max_new_tokens"] == CHAT_NEW_TOKENS
    assert options(parse({"prompt": "a", "max_new_tokens": 2, "seed": 5}), 0) == {
        "regex": "a*",
        "max_new_tokens": 2,
        "seed": 5,
        "keep_special_tokens": False,
    }
    assert "regex" not in options(parse({"prompt": "a", "choices": ["b"]}), 0)
    assert options(parse({"messages": HI, "tools": [{}]}), 0)["keep_special_tokens"] is True


def test_it_is_pickled_without_its_model_which_a_process_shares(talking):
    generator = Generator(talking, threads=1, **DRAWN)
    batch = {"prompt": ["abc"]}
    made = generator(batch)
    content = pickle.dumps(generator)
    assert len(content) < 2000
    assert content == pickle.dumps(Generator(talking, threads=1, **DRAWN))
    again = pickle.loads(content)
    assert again.model is generator.model
    assert again(batch) == made
    again.close()
    assert again(batch) == made


def test_another_process_loads_it_again(talking):
    generator = Generator(talking, threads=1, **DRAWN)
    batch = {"prompt": ["abc"]}
    made = generator(batch)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.map(generator, [batch]) == [made]


def test_settings_are_looked_at_when_it_is_made(tmp_path):
    with pytest.raises(OptionError, match="did you mean 'temperature'"):
        pastkey.Generator("b", temprature=1)  # type: ignore[call-arg]
    with pytest.raises(InputError, match="temperature is -1"):
        Generator("b", temperature=-1)
    for name in ("text", "tool_calls"):
        with pytest.raises(InputError, match=f"the batch has the column '{name}'"):
            Generator("b")({"prompt": ["a"], name: ["b"]})
    generator = Generator(tmp_path / "b")
    assert repr(generator) == f"<Generator {tmp_path / 'b'}>"
    with pytest.raises(MissingFileError):
        generator({"prompt": ["a"]})
    generator.close()  # of nothing


def test_no_more_rows_are_begun_than_fit_and_all_are_closed(talking, monkeypatch):
    begun: list[Stream] = []
    stream = LanguageModel.stream

    def counted(lm: LanguageModel, prompt: Any, **options: Any) -> Stream:
        begun.append(stream(lm, prompt, **options))
        return begun[-1]

    generator = Generator(talking, threads=1, max_batch=2, max_new_tokens=3)
    with monkeypatch.context() as patch:
        patch.setattr(LanguageModel, "stream", counted)
        reader = generator.answers(Row(place, place, {"prompt": letter}) for place, letter in enumerate("abcdefgh"))
        next(reader)
        assert len(begun) == 2
        reader.close()  # type: ignore[attr-defined]
    assert [one.completion is not None for one in begun] == [True, True]
    assert generator.model.scheduler.live == 0


@pytest.mark.parametrize("error", [MissingExtraError("no jinja2"), MemoryError()])
def test_what_is_wrong_with_everybody_ends_the_job(error):
    with pytest.raises(type(error)):
        told(error)
    assert told(KeyError("x")) == "KeyError: 'x'"
