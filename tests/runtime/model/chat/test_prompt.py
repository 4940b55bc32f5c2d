"""Stateless calls: the answers of a Chat, without one."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from pastkey.errors import InputError, OptionError
from pastkey.runtime import load
from pastkey.runtime.decoding.completion import completed

from ...conftest import TEMPLATE

MESSAGES = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "so"},
    {"role": "user", "content": "b"},
]
OPTIONS: dict[str, Any] = {"temperature": 1.0, "seed": 3, "max_new_tokens": 12}


@pytest.fixture(scope="module")
def lm(tiny, letters, make_bundle):
    config = {"chat_template": "{% if mood %}{{ mood }}{% endif %}" + TEMPLATE}
    return load(make_bundle(tiny, "fused", tokenizer=letters, tokenizer_config=config).path, threads=1)


def test_every_call_gives_the_answer_of_a_chat(lm):
    expected = lm.chat(messages=MESSAGES).ask(**OPTIONS)
    assert lm.generate_chat(MESSAGES, **OPTIONS).ids == expected.ids
    stream = lm.stream_chat(MESSAGES, **OPTIONS)
    assert "".join(chunk.text for chunk in stream) == expected.text
    assert stream.completion is not None
    assert stream.completion.text == expected.text
    prompt = lm.chat_prompt(MESSAGES)
    assert [one.ids for one in completed(lm.stream_many([prompt], **OPTIONS))] == [expected.ids]

    async def asynchronous() -> None:
        assert (await lm.agenerate_chat(MESSAGES, **OPTIONS)).ids == expected.ids
        async with lm.astream_chat(MESSAGES, **OPTIONS) as chunks:
            assert "".join([chunk.text async for chunk in chunks]) == expected.text
        many = lm.astream_many([prompt], 2, **OPTIONS)
        places = {place async for place, _ in many}
        assert places == {0, 1}
        assert [one.ids for one in many.completions if one] == [
            one.ids for one in lm.generate(prompt.ids, n=2, **OPTIONS)
        ]

    asyncio.run(asynchronous())


def test_the_messages_stay_as_they_are_and_an_answer_is_continued(lm):
    begun = [*MESSAGES, {"role": "assistant", "content": "a"}]
    before = [dict(message) for message in begun]
    assert lm.chat_text(begun).endswith("<assistant>a")
    assert lm.generate_chat(begun, **OPTIONS).ids == lm.chat(messages=begun).ask(**OPTIONS).ids
    assert begun == before


def test_variables_reach_the_template_and_unknown_ones_are_told(lm):
    assert lm.chat_text(MESSAGES, template_variables={"mood": "c"}).startswith("c<user>")
    tool = {"type": "function", "function": {"name": "w"}}
    for more in ({"template_variables": {"moud": 1}}, {"tools": [tool]}, {"documents": [{"text": "x"}]}):
        with pytest.raises(InputError, match="the chat template does not read"):
            lm.generate_chat(MESSAGES, **more)


def test_what_is_no_conversation_is_told(lm):
    with pytest.raises(InputError, match="empty list"):
        lm.generate_chat([])
    with pytest.raises(InputError, match="message 1 is"):
        lm.generate_chat([{"content": "x"}])
    with pytest.raises(OptionError, match="stream_chat"):
        lm.stream_chat(MESSAGES, temprature=1)
    with pytest.raises(InputError, match="context"):
        lm.generate_chat([{"role": "user", "content": "a" * 700}])


def test_a_closed_stream_has_what_was_written(lm):
    stream = lm.stream_chat(MESSAGES, **OPTIONS)
    said = next(stream).text + next(stream).text
    stream.close()
    assert stream.completion is not None
    assert (stream.completion.text, stream.completion.finish_reason) == (said, "cancelled")
    assert next(stream, None) is None
