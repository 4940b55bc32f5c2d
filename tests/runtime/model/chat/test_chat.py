"""Conversations: every answer is the one that a fresh generation from the whole rendered conversation gives."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, processors

from pastkey.errors import InputError, OptionError
from pastkey.runtime import LanguageModel, load
from pastkey.runtime.decoding.completion import completed
from pastkey.runtime.settings import CHAT_NEW_TOKENS, MAX_DRAFT_TOKENS
from pastkey.runtime.text.chat_template import ChatTemplate

from ...conftest import DRAWN, runs_of

# In the tiny decoder's letters. A begins, and ends nothing.
TEMPLATE = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}.{% endfor %}<assistant>"
# Of an answer it keeps the last letters, as some templates drop what a model thought first.
FORGETFUL = (
    "{% for m in messages %}<{{ m.role }}>"
    "{{ m.content[-3:] if m.role == 'assistant' else m.content }}.{% endfor %}<assistant>"
)
# Greedy, the tiny decoder repeats itself: this way its answers hang on every logit before them.
VARIED: dict[str, Any] = {**DRAWN, "repetition_penalty": 1.3, "seed": 3, "max_new_tokens": 20}


@pytest.fixture(scope="session")
def beginning_letters(letters):
    """The tiny decoder's letters, with A put before every prompt."""
    tokenizer = Tokenizer.from_str(letters.to_str())
    tokenizer.add_special_tokens([AddedToken("A", special=True)])
    tokenizer.post_processor = processors.TemplateProcessing("A $0", special_tokens=[("A", tokenizer.token_to_id("A"))])
    return tokenizer


@pytest.fixture(scope="session")
def make_model(tiny, beginning_letters, make_bundle):
    def make(template: str | None = TEMPLATE, graph: str = "fused", **fields: Any) -> LanguageModel:
        config = {"bos_token": "A"} | ({} if template is None else {"chat_template": template})
        bundle = make_bundle(tiny, graph, tokenizer=beginning_letters, tokenizer_config=config, **fields)
        return load(bundle.path, threads=1)

    return make


@pytest.fixture(scope="session", params=["fused", "standard"])
def model(request, make_model):
    return make_model(graph=request.param)


@pytest.fixture(scope="session")
def fresh(make_model):
    """Another model of the same weights, for the expected answers."""
    return make_model()


def rendered_ids(model: LanguageModel, messages: list[dict[str, str]], template: str = TEMPLATE) -> list[int]:
    text = ChatTemplate(template, {"bos_token": "A"}).render(messages)
    return model.tokenizer.encode(text, add_special_tokens=False)


def test_the_second_answer_is_that_of_a_fresh_generation_and_little_is_prefilled(model, fresh, monkeypatch):
    chat = model.chat("be brief")
    model.scheduler.store.clear()
    runs = runs_of(model.require_open().graph, monkeypatch)
    first = chat.ask("hello", **VARIED)
    second = chat.ask("and now", **VARIED)
    prompt = rendered_ids(fresh, chat.messages[:-1])
    assert second.ids == fresh.generate(prompt, **VARIED).ids
    assert len(set(second.ids)) > 5
    assert second.prompt_tokens == len(prompt) == 87
    # Not in the cache: the last token of the first answer, which was not fed, and the template's text after it.
    new = 1 + len(".<user>and now.<assistant>")
    assert [tokens for _, tokens in runs if tokens > MAX_DRAFT_TOKENS + 1] == [first.prompt_tokens, new]
    assert (first.cached_tokens, second.cached_tokens) == (0, 87 - new)
    assert [message["role"] for message in chat.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert [message["content"] for message in chat.messages[2::2]] == [first.text, second.text]


def test_the_template_alone_writes_the_begin_token(model, beginning_letters):
    begin = beginning_letters.token_to_id("A")
    assert beginning_letters.encode("Ab").ids == [begin, begin, 1]
    answer = model.chat().ask("b", max_new_tokens=1)
    assert answer.prompt_tokens == len("A<user>b.<assistant>")
    assert rendered_ids(model, [{"role": "user", "content": "b"}])[:2] == [begin, beginning_letters.token_to_id("<")]


STEPS = st.lists(
    st.tuples(st.sampled_from(["ask", "leave", "reset", "generate"]), st.text("abc é日", min_size=1, max_size=9)),
    max_size=6,
)


@pytest.mark.parametrize("template", [TEMPLATE, FORGETFUL], ids=["plain", "forgetful"])
def test_whatever_came_before_an_answer_is_that_of_a_fresh_generation(make_model, fresh, template):
    model, varied = make_model(template), VARIED | {"max_new_tokens": 9}

    @settings(max_examples=15)
    @given(STEPS)
    def check(steps: list[tuple[str, str]]) -> None:
        chat = model.chat()
        for step, text in [*steps, ("ask", "a")]:
            if step == "reset":
                chat.reset()
            elif step == "generate":
                model.generate(text, **varied)
            elif step == "leave":
                with chat.stream(text, **varied) as stream:
                    next(stream)
                    next(stream)
            else:
                prompt = rendered_ids(fresh, [*chat.messages, {"role": "user", "content": text}], template)
                answer = chat.ask(text, **varied)
                assert answer.ids == fresh.generate(prompt, **varied).ids
                assert answer.prompt_tokens == len(prompt)

    check()


def test_a_stream_is_an_answer_in_pieces_and_keeps_what_was_said_when_it_is_left(model):
    expected, chat, left = model.chat().ask("hello", **DRAWN), model.chat(), model.chat()
    pieces = [chunk.text for chunk in chat.stream("hello", **DRAWN)]
    assert "".join(pieces) == expected.text == chat.messages[-1]["content"]
    stream = left.stream("hello", **DRAWN)
    assert left.messages == []  # nothing has happened yet
    said = next(stream).text + next(stream).text
    stream.close()
    assert next(stream, None) is None
    assert left.messages == [{"role": "user", "content": "hello"}, {"role": "assistant", "content": said}]


def test_two_answers_of_one_conversation_at_once_are_refused(model):
    chat = model.chat()
    one, other = chat.stream("abc", **VARIED), chat.stream("def", **VARIED)
    said = next(one).text
    with pytest.raises(InputError, match="one question at a time"):
        next(other)
    said += "".join(chunk.text for chunk in one)
    assert [message["content"] for message in chat.messages] == ["abc", said]
    assert model.scheduler.live == 0


def test_a_cancelled_task_leaves_the_answer_as_far_as_it_came(model):
    chat = model.chat()

    async def leave() -> Any:
        async with chat.astream("hello", **{**VARIED, "max_new_tokens": 200}) as stream:
            async for _ in stream:
                if len(chat.messages) == 2 and len(chat.messages[1]["content"]) > 3:
                    break
        return stream.completion

    completion = asyncio.run(leave())
    assert (completion.finish_reason, completion.text) == ("cancelled", chat.messages[1]["content"])
    assert [said["role"] for said in chat.messages] == ["user", "assistant"]
    assert model.scheduler.live == 0


def test_settings_are_those_of_generate(model, fresh):
    expected = fresh.generate(rendered_ids(fresh, [{"role": "user", "content": "hello"}]), top_k=20, **VARIED)
    stop, chat = expected.text[5:7], model.chat()
    assert chat.ask("hello", stop=stop, top_k=20, **VARIED).finish_reason == "stop_string"
    assert chat.messages[-1]["content"] == expected.text[: expected.text.index(stop)]
    assert len(model.chat().ask("hello").ids) == CHAT_NEW_TOKENS


def test_a_question_that_is_refused_leaves_the_conversation_as_it_was(model):
    chat = model.chat()
    chat.ask("a" * 500, max_new_tokens=40)
    before = chat.messages
    chat.messages = broken = [*before, {"role": "user", "content": 1}]
    for call in (lambda: chat.ask("a"), chat.ask, chat.undo, chat.drop, lambda: chat.set_system("a")):
        with pytest.raises(InputError, match="message 3"):
            call()
        assert chat.messages is broken
    chat.messages = before
    for text, setting, words in (
        ("b" * 100, {}, r"the conversation has 678 tokens; the context is 600: .*/reset"),
        ("what?", {}, "no token covers"),
        ("a", {"temperature": -1}, "temperature is -1"),
    ):
        with pytest.raises(InputError, match=words):
            chat.stream(text, **setting)
        assert chat.messages is before
    answer = chat.ask("b", max_new_tokens=100)  # a question that fits is still answered, as far as there is room
    assert answer.finish_reason == "length"
    assert answer.prompt_tokens + answer.new_tokens == 601


def test_a_bundle_without_template_chats_by_one_that_is_given(speaking_bundle, tmp_path):
    file = tmp_path / "own.jinja"
    file.write_text("{% for m in messages %}{{ m.content }}.{% endfor %}")
    lm = load(speaking_bundle.path, threads=1)
    answer = lm.chat(template=file).ask("abc", max_new_tokens=5)
    assert answer.ids == lm.generate("abc.", max_new_tokens=5).ids


# --- stateless calls: the answers of a Chat, without one --------------------------------------------------------------
MESSAGES = [{"role": role, "content": text} for role, text in (("user", "hello"), ("assistant", "so"), ("user", "b"))]


@pytest.fixture(scope="module")
def lm(make_model):
    return make_model("{% if mood %}{{ mood }}{% endif %}" + TEMPLATE.removeprefix("{{ bos_token }}"))


def test_every_call_gives_the_answer_of_a_chat(lm):
    chat = lm.chat(messages=MESSAGES)
    expected = chat.ask(**VARIED)
    assert lm.generate_chat(MESSAGES, **VARIED).ids == expected.ids
    stream = lm.stream_chat(MESSAGES, **VARIED)
    assert "".join(chunk.text for chunk in stream) == stream.completion.text == expected.text
    prompt = lm.chat_prompt(MESSAGES)
    assert [one.ids for one in completed(lm.stream_many([prompt], **VARIED))] == [expected.ids]

    async def asynchronous() -> list[Any]:
        assert (await lm.agenerate_chat(MESSAGES, **VARIED)).ids == expected.ids
        async with lm.astream_chat(MESSAGES, **VARIED) as chunks:
            assert "".join([chunk.text async for chunk in chunks]) == expected.text
        other = lm.chat(messages=MESSAGES)
        assert (await other.aask(**VARIED)).ids == expected.ids
        assert other.messages == chat.messages
        with pytest.raises(OptionError, match=r"chat\.aask\(\) has no option 'x'"):
            await other.aask("a", x=1)
        many = lm.astream_many([prompt], 2, **VARIED)
        assert {place async for place, _ in many} == {0, 1}
        return many.completions

    found = asyncio.run(asynchronous())
    assert [one.ids for one in found] == [one.ids for one in lm.generate(prompt.ids, n=2, **VARIED)]


def test_the_messages_stay_as_they_are_and_an_answer_is_continued(lm):
    begun = [*MESSAGES, {"role": "assistant", "content": "a"}]
    before = [dict(message) for message in begun]
    assert lm.chat_text(begun).endswith("<assistant>a")
    assert lm.generate_chat(begun, **VARIED).ids == lm.chat(messages=begun).ask(**VARIED).ids
    assert begun == before


def test_variables_reach_the_template_and_unknown_ones_are_told(lm):
    assert lm.chat_text(MESSAGES, template_variables={"mood": "c"}).startswith("c<user>")
    tool = {"type": "function", "function": {"name": "w"}}
    for more in ({"template_variables": {"moud": 1}}, {"tools": [tool]}, {"documents": [{"text": "x"}]}):
        with pytest.raises(InputError, match="the chat template does not read"):
            lm.generate_chat(MESSAGES, **more)


def test_what_is_no_conversation_is_told(lm):
    for messages, words in (([], "empty list"), ([{"role": "user", "content": "a" * 700}], "context")):
        with pytest.raises(InputError, match=words):
            lm.generate_chat(messages)
    with pytest.raises(OptionError, match="stream_chat"):
        lm.stream_chat(MESSAGES, temprature=1)
