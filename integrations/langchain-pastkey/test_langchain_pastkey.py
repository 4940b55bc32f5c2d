"""Run in an environment of this package by tests/programs/test_integrations.py, which makes the bundles."""

import asyncio
import os
from pathlib import Path

import pytest
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_pastkey import ChatPastkey
from pydantic import BaseModel, Field

import pastkey
from pastkey.errors import InputError, OptionError

BUNDLE = Path(os.environ["PASTKEY_TEST_BUNDLES"]) / "chat"  # its chat template is for tools, too
CALL = r'So: <tool_call>\{"name": "add", "arguments": \{"a": 1, "b": 2\}\}</tool_call>'
SAMPLED = {"temperature": 1.0, "seed": 3, "max_new_tokens": 12}


class City(BaseModel, extra="forbid"):
    """A city."""

    wet: bool
    people: int = Field(ge=0, le=99)


def add(a: int, b: int) -> int:
    """Adds."""
    return a + b


def switch(on: bool) -> None:
    """Switches."""


@pytest.fixture(scope="module")
def lm() -> pastkey.LanguageModel:
    return pastkey.load(BUNDLE, threads=1)


@pytest.fixture(scope="module")
def model(lm: pastkey.LanguageModel) -> ChatPastkey:
    return ChatPastkey(lm, **SAMPLED)


def test_invoke_stream_and_their_asynchronous_forms_give_the_runtimes_text(
    model: ChatPastkey, lm: pastkey.LanguageModel
) -> None:
    said = [("system", "Short."), ("human", "Hello"), ("ai", "Hi"), ("human", "And?")]
    roles = {"human": "user", "ai": "assistant"}
    expected = lm.generate_chat([{"role": roles.get(role, role), "content": text} for role, text in said], **SAMPLED)
    answer = model.invoke(said)
    assert answer.content == expected.text
    usage = answer.usage_metadata
    assert (usage["input_tokens"], usage["output_tokens"]) == (expected.prompt_tokens, expected.new_tokens)
    assert answer.response_metadata["finish_reason"] == "length"

    async def asynchronously() -> list[str]:
        pieces = [chunk.content async for chunk in model.astream(said)]
        return ["".join(pieces), (await model.ainvoke(said)).content]

    pieces = list(model.stream(said))
    assert len(pieces) > 3
    assert "".join(piece.content for piece in pieces) == expected.text
    assert sum(pieces[1:], pieces[0]).usage_metadata["output_tokens"] == expected.new_tokens
    assert asyncio.run(asynchronously()) == [expected.text] * 2
    assert [one.content for one in model.batch([said, said])] == [expected.text] * 2


def test_a_bundles_folder_is_loaded_at_the_first_use_and_options_are_the_calls() -> None:
    model = ChatPastkey(BUNDLE, load_options={"threads": 1}, max_new_tokens=3)
    assert model.invoke("Hello").usage_metadata["output_tokens"] == 3
    assert model.invoke("Hello", max_new_tokens=5).usage_metadata["output_tokens"] == 5
    stopped = model.bind(max_new_tokens=20).invoke("Hello", stop=["a"])
    assert "a" not in stopped.content
    with pytest.raises(InputError, match="temperature is -1"):
        model.invoke("Hello", temperature=-1)
    with pytest.raises(OptionError, match="no option 'warmth'"):
        model.invoke("Hello", warmth=1)


def test_a_tool_is_called_and_its_result_goes_back(model: ChatPastkey) -> None:
    tools = model.bind_tools([add], regex=CALL, max_new_tokens=120)
    answer = tools.invoke("Hello")
    (call,) = answer.tool_calls
    assert (answer.content.strip(), call["name"], call["args"]) == ("So:", "add", {"a": 1, "b": 2})
    pieces = list(tools.stream("Hello"))
    whole = sum(pieces[1:], pieces[0])
    assert whole.content == answer.content
    assert [(one["name"], one["args"]) for one in whole.tool_calls] == [("add", {"a": 1, "b": 2})]
    result = ToolMessage("3", tool_call_id=call["id"], name="add")
    after = model.bind_tools([add]).invoke([HumanMessage("Hello"), answer, result])
    assert after.usage_metadata["input_tokens"] > answer.usage_metadata["input_tokens"]
    with pytest.raises(InputError, match="tool_choice is 'subtract'"):
        model.bind_tools([add], tool_choice="subtract").invoke("Hello")
    for choice in ("any", "switch"):
        (call,) = model.bind_tools([switch], tool_choice=choice, max_new_tokens=200).invoke("Hello").tool_calls
        assert call["name"] == "switch"


def test_an_answer_is_of_the_class_or_the_schema(model: ChatPastkey) -> None:
    structured = model.with_structured_output(City, method="json_schema", strict=True)
    assert isinstance(structured.invoke("Hello", max_new_tokens=99), City)
    as_dict = model.with_structured_output(City.model_json_schema()).invoke("Hello", max_new_tokens=99)
    assert City.model_validate(as_dict)
    cut = model.with_structured_output(City, include_raw=True).invoke("Hello", max_new_tokens=2)
    assert cut["parsed"] is None
    assert cut["parsing_error"] is not None
    assert cut["raw"].response_metadata["finish_reason"] == "length"
