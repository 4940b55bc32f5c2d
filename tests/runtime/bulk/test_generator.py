"""A generator answers each row as a separate call would, with any other rows, in batches of lists and of arrays."""

import multiprocessing
import pickle
import random
import shutil

import numpy as np
import pytest

import pastkey
from pastkey.errors import InputError, MissingExtraError, MissingFileError, OptionError
from pastkey.runtime import load
from pastkey.runtime.bulk import generator as module
from pastkey.runtime.bulk.generator import as_python, as_text, told
from pastkey.runtime.bulk.rows import Row, seed_of
from pastkey.runtime.options import MAX_NEW_TOKENS
from pastkey.runtime.settings import CHAT_NEW_TOKENS

from ..conftest import TEMPLATE
from .rows import DRAWN, HI, plain_rows


@pytest.fixture(scope="module")
def model(talking):
    return load(talking, threads=1)


@pytest.fixture
def made(talking):
    """made(**OPTIONS): a generator on one thread."""
    return lambda **options: module.Generator(talking, threads=1, **options)


def columns(rows):
    return {name: [row[name] for row in rows] for name in rows[0]}


def answered(generator, *rows):
    found = {row.number: answer for row, answer in generator.answers(Row(i, i, row) for i, row in enumerate(rows))}
    return [found[place] for place in range(len(rows))]


@pytest.mark.parametrize("exact", [False, True])
def test_each_row_is_answered_as_by_a_call_of_its_own(made, model, exact):
    rows = plain_rows(40)
    found = made(exact=exact, **DRAWN)(columns(rows))
    assert found["text"] == [model.generate(row["prompt"], seed=seed_of(0, row["id"]), **DRAWN).text for row in rows]
    assert found["topic"] == columns(rows)["topic"]
    assert found["prompt_tokens"] == [len(row["prompt"]) for row in rows]
    assert (found["new_tokens"], found["error"], set(found["finish_reason"])) == ([12] * 40, [""] * 40, {"length"})
    assert len(set(found["text"])) > 30


def test_neither_order_nor_company_changes_a_row(made):
    rows, generator = plain_rows(30), made(**DRAWN)
    whole = dict(enumerate(generator(columns(rows))["text"]))
    random.Random(0).shuffle(rows)
    for start in range(0, 30, 7):
        part = columns(rows[start : start + 7])
        assert generator(part)["text"] == [whole[identity] for identity in part["id"]]
    assert made(**DRAWN, seed=1)(columns(rows))["text"] != [whole[row["id"]] for row in rows]


def test_what_neighbours_share_is_computed_once(made, monkeypatch):
    cached, answer_of = [], module.answer_of

    def told(answer, **how):
        cached.append(answer.cached_tokens)
        return answer_of(answer, **how)

    monkeypatch.setattr(module, "answer_of", told)
    begin = "abcdefgh" * 6
    made(max_batch=2, max_new_tokens=2)({"prompt": ["zz", *(begin + letter * 3 for letter in "abcdef"), "yy"]})
    assert sorted(cached) == [0, 0, 0] + [len(begin)] * 5


def test_arrays_and_missing_values_are_as_lists_and_none(made):
    generator, prompts = made(max_new_tokens=3), np.array(["ab", "ab", "ab"], object)
    limits = np.array([2.0, np.nan, 5.0])  # 2.0 is no whole number
    found = generator({"id": np.array([1, 2, 3]), "prompt": prompts, "max_new_tokens": limits})
    assert [bool(error) for error in found["error"]] == [True, False, True]
    assert (found["text"][0], found["finish_reason"][0], found["new_tokens"]) == ("", "", [0, 3, 0])
    whole = generator({"prompt": [np.array([1, 2]), [1, 2]], "max_new_tokens": np.array([4, 2])})
    assert whole["new_tokens"] == [4, 2]
    given = {"a": np.array([[1, 2]]), "b": (np.float32(0.5), float("nan")), "c": np.int64(3)}
    assert as_python(given) == {"a": [[1, 2]], "b": [0.5, None], "c": 3}
    assert (as_text(None), as_text(["é"])) == (None, '["é"]')


def test_conversations_are_answered_as_by_the_chat(made, model):
    longer = [*HI, {"role": "assistant", "content": "no"}, {"role": "user", "content": "so"}]
    talks = {"a": HI, "b": longer, "c": longer[:2]}  # the last: an answer that continues
    found = made(**DRAWN)({"id": [*talks], "messages": [*talks.values()]})
    for (identity, messages), text in zip(talks.items(), found["text"], strict=True):
        chat = model.chat()
        chat.messages = messages
        assert len(text) > 3
        assert text == chat.ask(seed=seed_of(0, identity), **DRAWN).text


def test_a_bundle_that_was_exported_anew_is_talked_to_by_its_own_template(tiny, letters, make_bundle):
    """Also by a generator that another one, over the same model, has closed."""
    configs = ({"chat_template": template} for template in (TEMPLATE, "abc"))
    first, second = (make_bundle(tiny, tokenizer=letters, tokenizer_config=config).path for config in configs)
    one, other = (module.Generator(first, threads=1, max_new_tokens=2) for _ in range(2))
    assert one({"messages": [HI]})["prompt_tokens"] != [3]
    other.close()
    shutil.rmtree(first)
    second.rename(first)
    assert one({"messages": [HI]})["prompt_tokens"] == [3]


def test_tools_are_told_and_their_calls_are_read(tiny, letters, make_bundle, made):
    template = TEMPLATE.replace("<assistant>", "{{ tools[0].function.name if tools }}<assistant>")
    bundle = make_bundle(tiny, "fused", tokenizer=letters, tokenizer_config={"chat_template": template})
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    generator = module.Generator(bundle.path, threads=1, max_new_tokens=4)
    asked, plain = answered(generator, {"messages": HI, "tools": tools}, {"messages": HI})
    assert (asked["prompt_tokens"], asked["tool_calls"]) == (plain["prompt_tokens"] + 1, [])
    table = generator({"messages": [HI, HI], "tools": [tools, None]})
    assert table["tool_calls"] == ["[]", ""]
    assert ("tool_calls" in plain, "logprobs" in table) == (False, False)
    assert len(made(logprobs=0)({"prompt": ["a"]})["logprobs"]) == 1


WRONG = {
    "no row": "no row",
    "the prompt is empty": {"prompt": ""},
    "temperature is 'hot'": {"prompt": "a", "temperature": "hot"},
    "out of range": {"prompt": [99]},
    "were both given": {"prompt": "a", "regex": "[", "choices": ["a"]},
}


@pytest.mark.parametrize("words", WRONG)
def test_what_is_wrong_with_a_row_is_its_own_error(made, words):
    before, bad, after = answered(made(), {"prompt": "ab"}, WRONG[words], {"prompt": "ab"})
    assert words in bad["error"]
    assert bad["text"] is None
    assert before == after
    assert before["error"] is None


def test_a_rows_settings_win_and_have_the_defaults_of_its_kind(made):
    generator = made(regex="a*")

    def options(**row):
        return generator._options(module.parse_request(row), 0)

    assert options(prompt="a")["max_new_tokens"] == MAX_NEW_TOKENS
    assert options(messages=HI)["max_new_tokens"] == CHAT_NEW_TOKENS
    own = {"max_new_tokens": 2, "seed": 5}
    assert options(prompt="a", **own) == {"regex": "a*", "keep_special_tokens": False, **own}
    assert "regex" not in options(prompt="a", choices=["b"])
    assert options(messages=HI, tools=[{}])["keep_special_tokens"] is True


def test_it_is_pickled_without_its_model_which_a_process_shares_and_another_loads_again(made):
    generator, batch = made(**DRAWN), {"prompt": ["abc"]}
    found, content = generator(batch), pickle.dumps(generator)
    assert len(content) < 2000
    assert content == pickle.dumps(made(**DRAWN))
    again = pickle.loads(content)
    assert again.model is generator.model
    assert again(batch) == found
    again.close()
    assert again(batch) == found
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.map(generator, [batch]) == [found]


def test_settings_are_looked_at_when_it_is_made(tmp_path):
    generator = pastkey.Generator(tmp_path / "b")
    assert repr(generator) == f"<Generator {tmp_path / 'b'}>"
    with pytest.raises(OptionError, match="did you mean 'temperature'"):
        pastkey.Generator("b", temprature=1)  # type: ignore[call-arg]
    with pytest.raises(InputError, match="temperature is -1"):
        pastkey.Generator("b", temperature=-1)
    for name in ("text", "tool_calls"):
        with pytest.raises(InputError, match=f"the batch has the column '{name}'"):
            generator({"prompt": ["a"], name: ["b"]})
    with pytest.raises(MissingFileError):
        generator({"prompt": ["a"]})
    generator.close()  # of nothing


def test_no_more_rows_are_begun_than_fit_and_all_are_closed(made, monkeypatch):
    begun, stream, generator = [], module.open_prompt, made(max_batch=2, max_new_tokens=3)

    def counted(*given):
        begun.append(stream(*given))
        return begun[-1]

    with monkeypatch.context() as patch:
        patch.setattr(module, "open_prompt", counted)
        reader = generator.answers(Row(place, place, {"prompt": letter}) for place, letter in enumerate("abcdefgh"))
        next(reader)
        assert len(begun) == 2
        reader.close()
    assert [one.completion is not None for one in begun] == [True, True]
    assert generator.model.scheduler.live == 0


@pytest.mark.parametrize("error", [MissingExtraError("no jinja2"), MemoryError()])
def test_what_is_wrong_with_everybody_ends_the_job(error):
    with pytest.raises(type(error)):
        told(error)
    assert told(KeyError("x")) == "KeyError: 'x'"
